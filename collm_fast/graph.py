"""BipartiteGraph: the interactions as a symmetric graph in CSR form; build, move, save, load.

The product with it is `collm_fast.ops.lightgcn_propagate`. The compiled builder is csrc/host/graph.cpp;
`build_graph_numpy` is its twin. Floor F0: imports `_native` only.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collm_fast import _native

Ids = npt.NDArray[np.integer[Any]]
Parts = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]
_MAX_NODES = 2**31 - 1


def _fail(rule: str, got: object) -> NoReturn:
    raise ValueError(f"BipartiteGraph: expected {rule}, got {got}")


def _ids(name: str, values: Any) -> Ids:
    """[E] integers of any width and stride, not copied where they are an array or a CPU tensor; no value is read."""
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex():
            _fail(f"{name} of an integer dtype", f"{values.dtype} (row 0 is {values.reshape(-1)[:1].tolist()})")
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 1:
        _fail(f"{name} of shape [E]", list(array.shape))
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        _fail(f"{name} of an integer dtype", f"{array.dtype} (row 0 is {array[0]!r})")
    # What the machine cannot load as it lies (another byte order, a packed record) is copied.
    return np.require(array, array.dtype.newbyteorder("="), "A")


def _in_range(name: str, ids: Ids, limit: int) -> npt.NDArray[np.int64]:
    bad = (ids < 0) | (ids >= limit)
    if bad.any():
        row = int(bad.argmax())
        _fail(f"{name} in [0, {limit})", f"{ids[row]} at row {row}")
    return ids.astype(np.int64, copy=False)


def build_graph_numpy(users: Ids, items: Ids, num_users: int, num_items: int) -> Parts:
    """(crow [N+1], col [nnz], inv_sqrt_degree [N]): the NumPy twin of `_C.build_graph`, bit for bit."""
    user, item = _in_range("users", users, num_users), _in_range("items", items, num_items)
    pair = np.unique(user * max(num_items, 1) + item)
    user, item = pair // max(num_items, 1), pair % max(num_items, 1)
    degree = np.concatenate((np.bincount(user, minlength=num_users), np.bincount(item, minlength=num_items)))
    crow = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(degree, dtype=np.int64)))
    # Pairs ascend by (user, item); a stable sort by item keeps the users of an item ascending.
    col = np.concatenate((num_users + item, user[np.argsort(item, kind="stable")]))
    inverse = np.where(degree > 0, 1.0 / np.sqrt(np.maximum(degree, 1)), 0.0)
    return crow, col.astype(np.int32), inverse.astype(np.float32)


@dataclass(frozen=True, eq=False)
class BipartiteGraph:
    """The undirected user-item graph: users are nodes 0..U-1, items U..U+I-1, each edge stored in both directions.

    Fields:
        crow: [N+1] int64, where each node's neighbours start in `col`.
        col: [nnz] int32, ascending inside a node.
        inv_sqrt_degree: [N] float32, degree^-1/2, and 0 for a node without edges.
    """

    crow: Tensor
    col: Tensor
    inv_sqrt_degree: Tensor
    num_users: int
    num_items: int

    @classmethod
    def from_interactions(cls, users: Any, items: Any, num_users: int, num_items: int) -> BipartiteGraph:
        """The graph of (user, item) pairs; duplicates are merged, the order of the pairs does not matter.

        Runs on torch.get_num_threads() threads, with the same bits for any number of them. The ids are not copied; the
        memory needed is the graph's and 8 bytes for each pair.

        Args:
            users, items: [E] integer tensors, arrays or lists, in [0, num_users) and [0, num_items); any strides.
            num_users, num_items: sizes of the tables; together below 2^31.
        Returns: the graph, on the CPU.
        Raises: ValueError for another dtype, unequal lengths or an id out of range; it names the first bad row.
        """
        if num_users < 0 or num_items < 0 or num_users + num_items > _MAX_NODES:
            _fail("num_users >= 0 and num_items >= 0 with a sum below 2^31", f"{num_users} and {num_items}")
        user, item = _ids("users", users), _ids("items", items)
        if user.size != item.size:
            _fail("users and items of equal length", f"{user.size} and {item.size}")
        native = _native.C()
        if native is None:
            parts = build_graph_numpy(user, item, num_users, num_items)
        else:
            parts = native.build_graph(user, item, num_users, num_items, torch.get_num_threads())
        crow, col, inverse = map(torch.from_numpy, parts)
        return cls(crow, col, inverse, num_users, num_items)

    @property
    def num_nodes(self) -> int:
        """N = num_users + num_items."""
        return self.num_users + self.num_items

    @property
    def num_edges(self) -> int:
        """The number of undirected edges, half of what `col` holds."""
        return self.col.numel() // 2

    def to(self, device: torch.device | str) -> BipartiteGraph:
        """The same graph with its tensors on `device`; itself if they are there."""
        crow, col = self.crow.to(device), self.col.to(device)
        if crow is self.crow and col is self.col:
            return self
        return BipartiteGraph(crow, col, self.inv_sqrt_degree.to(device), self.num_users, self.num_items)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically: a reader sees the old file or the whole new one."""
        from safetensors.torch import save_file

        target = Path(path)
        tensors = {"crow": self.crow.cpu(), "col": self.col.cpu(), "inv_sqrt_degree": self.inv_sqrt_degree.cpu()}
        sizes = {"num_users": self.num_users, "num_items": self.num_items}
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            # One key: safetensors writes several in an order of chance, and equal graphs should be equal files.
            save_file(tensors, temporary, metadata={"collm_fast": json.dumps(sizes, sort_keys=True)})
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> BipartiteGraph:
        """Reads what `save` wrote.

        Args:
            mmap: map the file instead of reading it. `crow` is checked now; `col` is read, and checked, only by what
                uses it (`lightgcn_propagate` checks what it reads in every call), or by `validate()`. While it is
                mapped the file must not be written to in place; `save` never does that, and may replace it.
        Raises: ValueError where the file is not such a graph, or not a valid one.
        """
        from safetensors import SafetensorError, safe_open

        names = ("crow", "col", "inv_sqrt_degree")
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                sizes = _sizes(file.metadata() or {})
                if set(file.keys()) != set(names) or sizes is None:
                    _fail(f"a file with {sorted(names)} and their sizes", f"{path} with {sorted(file.keys())}")
                # safetensors maps the file: a tensor's memory is the file's until it is copied.
                crow, col, inverse = (
                    file.get_tensor(name) if mmap else file.get_tensor(name).clone() for name in names
                )
        except SafetensorError as error:
            raise ValueError(f"BipartiteGraph: expected a graph file, got {path}: {error}") from error
        graph = cls(crow, col, inverse, *sizes)
        graph._check_rows(f" in {path}")
        if not mmap:
            graph._check_columns(f" in {path}")
        return graph

    def validate(self) -> None:
        """Checks shapes, dtypes, and every value of `crow` and `col`, on their device.

        Raises: ValueError where something would be read out of bounds.
        """
        self._check_rows("")
        self._check_columns("")

    def _check_rows(self, where: str) -> None:
        nodes, crow, col = self.num_nodes, self.crow, self.col
        kinds = (crow.dtype, col.dtype, self.inv_sqrt_degree.dtype)
        shapes = (tuple(crow.shape), tuple(self.inv_sqrt_degree.shape), col.dim())
        if kinds != (torch.int64, torch.int32, torch.float32) or shapes != ((nodes + 1,), (nodes,), 1):
            _fail("crow int64 [N+1], col int32 [nnz], inv_sqrt_degree float32 [N]", f"{kinds}, {shapes}{where}")
        if int(crow[0]) != 0 or int(crow[-1]) != col.numel() or bool((crow[1:] < crow[:-1]).any()):
            _fail(f"crow to rise from 0 to nnz ({col.numel()})", f"{int(crow[0])} .. {int(crow[-1])}{where}")

    def _check_columns(self, where: str) -> None:
        if self.col.numel():
            low, high = map(int, self.col.aminmax())
            if low < 0 or high >= self.num_nodes:
                _fail(f"col in [0, {self.num_nodes})", f"{low} .. {high}{where}")


def _sizes(metadata: dict[str, str]) -> tuple[int, int] | None:
    """num_users and num_items of a graph file; None where it has none."""
    try:
        sizes = json.loads(metadata.get("collm_fast", ""))
        found = (sizes["num_users"], sizes["num_items"])
    except (ValueError, TypeError, KeyError):
        return None
    return found if all(isinstance(size, int) and 0 <= size <= _MAX_NODES for size in found) else None
