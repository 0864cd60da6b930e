"""Tables on disk, CSV or Parquet by their suffix: pairs to score, predictions, rankings. Floor F1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_fast.io.atomic import write_atomic

SUFFIXES = (".parquet", ".csv")
# Rows that `write_parts` holds before it writes them, as a row group of their own in Parquet.
_GROUP = 1 << 16


def check_suffix(path: Path, what: str) -> None:
    """Raises: ValueError for a path that is neither CSV nor Parquet by its name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{what}: expected a file named *{' or *'.join(SUFFIXES)}, got {path}")


def write_table(path: Path, columns: Mapping[str, NDArray[Any] | Sequence[Any]]) -> None:
    """Write columns of one length atomically."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    check_suffix(path, "out")
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    writer = pa.parquet.write_table if path.suffix == ".parquet" else pa.csv.write_csv
    write_atomic(path, lambda temporary: writer(table, temporary))


def write_parts(path: Path, kinds: Mapping[str, Any], parts: Iterable[Mapping[str, NDArray[Any]]]) -> int:
    """Write a table part by part, atomically, without ever holding it whole.

    Args: kinds: the NumPy dtype of each column, in their order. parts: columns of one length each.
    Returns: the number of rows.
    Raises: ValueError for another suffix; whatever `parts` raises, and then no file is left.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    check_suffix(path, "out")
    schema = pa.schema([(name, pa.from_numpy_dtype(kind)) for name, kind in kinds.items()])
    kind = pa.parquet.ParquetWriter if path.suffix == ".parquet" else pa.csv.CSVWriter
    total = 0

    def write(temporary: Path) -> None:
        nonlocal total
        with kind(temporary, schema) as writer:
            waiting = [schema.empty_table()]
            rows = 0
            for part in parts:
                waiting.append(pa.table(dict(part), schema=schema))
                rows += waiting[-1].num_rows
                if rows >= _GROUP:
                    writer.write_table(pa.concat_tables(waiting))
                    total, rows, waiting = total + rows, 0, []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
            total += rows

    write_atomic(path, write)
    return total


def read_table(path: Path, needed: Sequence[str], what: str) -> dict[str, NDArray[Any]]:
    """Every column of a CSV or Parquet file as an array; `what` names the option in messages.

    Needed columns hold ids: of a CSV file they are text without the spaces around it, so `007` stays `007`. Other
    columns have the type that Arrow finds.

    Raises: ValueError naming the file for one that cannot be read, a missing column, an empty table, or a missing
    value in a needed column with its row.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    check_suffix(path, what)
    if not path.is_file():
        raise ValueError(f"{what}: expected a file, got {path}, which does not exist")
    try:
        table = pa.parquet.read_table(path) if path.suffix == ".parquet" else _read_csv(path, needed)
    except (pa.ArrowException, OSError) as error:
        kind = "Parquet" if path.suffix == ".parquet" else "CSV"
        raise ValueError(f"{what}: expected {kind} in {path}, got {str(error).splitlines()[0]}") from error
    for name in needed:
        if name not in table.column_names:
            raise ValueError(f"{what}: expected a column {name!r} in {path}, got {', '.join(table.column_names)}")
        column = table.column(name)
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy()))
            raise ValueError(f"{what}: expected a value in column {name!r} of {path}, got none in row {row}")
    if table.num_rows == 0:
        raise ValueError(f"{what}: expected at least one row in {path}, got none")
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _read_csv(path: Path, as_text: Sequence[str]) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv

    # Only an empty field is a missing id: "NA" may be one.
    types = dict.fromkeys(as_text, pa.string())
    convert = pa.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
    table = pa.csv.read_csv(path, convert_options=convert)
    for place, name in enumerate(table.column_names):
        if name in types:
            table = table.set_column(place, name, pc.utf8_trim_whitespace(table.column(place)))
    return table
