"""Reads a pickled pandas DataFrame of numbers, text and lists without pandas, and runs nothing a pickle asks for.

pandas' own classes are replaced by inert stand-ins that only keep their arguments; NumPy's array pieces are the only
code that runs; every other name in the pickle is refused. Used by published.py, only on the user's request. Floor F2.
"""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from collm_fast.data.ragged import Array

_NUMPY = {"_reconstruct": "multiarray", "scalar": "multiarray", "_frombuffer": "numeric"}
_INDEXES = ("base.Index", "base._new_Index", "numeric.Int64Index", "numeric.UInt64Index", "range.RangeIndex")
_INERT = {
    "pandas.core.frame.DataFrame",
    "pandas.core.internals.managers.BlockManager",
    "pandas._libs.internals._unpickle_block",
    *(f"pandas.core.indexes.{name}" for name in _INDEXES),
}


class _Inert:
    """Stands for an object of pandas: keeps what it was made from."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Inert:
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _INERT:
            return type(name, (_Inert,), {})
        if name in _NUMPY and module in (f"numpy.core.{_NUMPY[name]}", f"numpy._core.{_NUMPY[name]}"):
            home = np._core if hasattr(np, "_core") else np.core
            return getattr(getattr(home, _NUMPY[name]), name)
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module in ("builtins", "__builtin__") and name == "slice":
            return slice
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"{module}.{name}")


def _latin1(text: str, encoding: str) -> bytes:
    # The form that bytes take in pickles of protocol 2; any other codec has no business here.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding!r}")
    return codecs.encode(text, "latin1")


def read_frame(file: Path) -> dict[str, Array]:
    """The columns of a DataFrame that pandas 1.x or 2.x pickled, by name; values are numbers, text or lists.

    Raises: ValueError for a file that is no such pickle, or that names anything but what such a table needs.
    """
    with file.open("rb") as stream:
        frame = _load(stream, file)
    try:
        return _columns(frame)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"prepare: expected a pandas DataFrame in {file}, got another layout ({error})") from error


def _load(stream: BinaryIO, file: Path) -> Any:
    try:
        return _Unpickler(stream).load()
    except pickle.UnpicklingError as error:
        rule = "a pickled table of numbers, text and lists"
        raise ValueError(f"prepare: expected {rule} in {file}, got {error}") from error
    # A damaged pickle can raise nearly anything that unpacking bytes can.
    except (EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"prepare: expected a complete pickle in {file}, got {error}") from error


def _columns(frame: Any) -> dict[str, Array]:
    if type(frame).__name__ != "DataFrame":
        raise ValueError(f"a {type(frame).__name__}")
    manager = frame.state["_mgr"] if "_mgr" in frame.state else frame.state["_data"]
    if manager.args:  # pandas >= 1.3
        blocks = [(block.args[0], block.args[1]) for block in manager.args[0]]
        axes = manager.args[1]
    else:  # the state of older releases
        state = manager.state[3]["0.14.1"]
        blocks = [(block["values"], block["mgr_locs"]) for block in state["blocks"]]
        axes = state["axes"]
    names = [str(name) for name in _index_values(axes[0])]
    out: dict[str, Array] = {}
    for values, places in blocks:
        where = np.arange(len(names))[places]
        if not isinstance(values, np.ndarray) or values.shape[0] != len(where):
            raise ValueError(f"a column of type {type(values).__name__}")
        for name, column in zip(where.tolist(), values, strict=True):
            out[names[name]] = column
    return out


def _index_values(index: Any) -> list[Any]:
    described = index.args[1]  # _new_Index(class, description)
    if "data" in described:
        return list(described["data"])
    return list(range(described["start"], described["stop"], described["step"]))
