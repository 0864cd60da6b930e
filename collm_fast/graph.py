"""BipartiteGraph: the interactions as a symmetric graph in CSR form; build, move, save, load.

The product with it is `collm_fast.ops.lightgcn_propagate`. The compiled builder is csrc/host/graph.cpp;
`build_graph_numpy` is its twin. Floor F0: imports `_native` only.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collm_fast import _native

Ids = npt.NDArray[np.int64]
_MAX_NODES = 2**31 - 1


def _fail(rule: str, got: object) -> None:
    raise ValueError(f"BipartiteGraph: expected {rule}, got {got}")


def _ids(name: str, values: Any, limit: int) -> Ids:
    """int64, contiguous, every element in [0, limit); ValueError names the first that is not."""
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
    bad = (array < 0) | (array >= limit)
    if bad.any():
        row = int(bad.argmax())
        _fail(f"{name} in [0, {limit})", f"{array[row]} at row {row}")
    return np.ascontiguousarray(array, dtype=np.int64)


def build_graph_numpy(
    users: Ids, items: Ids, num_users: int, num_items: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """(crow int64 [N+1], col int32 [nnz]): the NumPy twin of `_C.build_graph`, bit for bit."""
    pair = np.unique(users * np.int64(max(num_items, 1)) + items)
    user, item = pair // max(num_items, 1), pair % max(num_items, 1)
    degree = np.concatenate((np.bincount(user, minlength=num_users), np.bincount(item, minlength=num_items)))
    crow = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(degree, dtype=np.int64)))
    # Pairs ascend by (user, item); a stable sort by item keeps the users of an item ascending.
    col = np.concatenate((num_users + item, user[np.argsort(item, kind="stable")]))
    return crow, col.astype(np.int32)


def _inv_sqrt_degree(crow: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    degree = np.diff(crow)
    return np.where(degree > 0, 1.0 / np.sqrt(np.maximum(degree, 1)), 0.0).astype(np.float32)


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

        Args:
            users, items: [E] integer tensors, arrays or lists, in [0, num_users) and [0, num_items).
            num_users, num_items: sizes of the tables; together below 2^31.
        Returns: the graph, on the CPU.
        Raises: ValueError for another dtype, unequal lengths or an id out of range; it names the first bad row.
        """
        if num_users < 0 or num_items < 0 or num_users + num_items > _MAX_NODES:
            _fail("num_users >= 0 and num_items >= 0 with a sum below 2^31", f"{num_users} and {num_items}")
        user, item = _ids("users", users, num_users), _ids("items", items, num_items)
        if user.size != item.size:
            _fail("users and items of equal length", f"{user.size} and {item.size}")
        native = _native.C()
        build = native.build_graph if native is not None and hasattr(native, "build_graph") else build_graph_numpy
        crow, col = build(user, item, num_users, num_items)
        parts = (torch.from_numpy(crow), torch.from_numpy(col), torch.from_numpy(_inv_sqrt_degree(crow)))
        return cls(*parts, num_users, num_items)

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
    def load(cls, path: str | os.PathLike[str]) -> BipartiteGraph:
        """Reads what `save` wrote. Raises: ValueError where the file is not such a graph, or not a valid one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                sizes = json.loads((file.metadata() or {}).get("collm_fast", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"BipartiteGraph: expected a graph file, got {path}: {error}") from error
        names = {"crow", "col", "inv_sqrt_degree"}
        if set(tensors) != names or not {"num_users", "num_items"} <= set(sizes):
            _fail(f"a file with {sorted(names)}", f"{path} with {sorted(tensors)}")
        graph = cls(**tensors, num_users=sizes["num_users"], num_items=sizes["num_items"])
        graph._validate(path)
        return graph

    def _validate(self, path: object) -> None:
        """A damaged file must not become a read out of bounds later."""
        nodes, crow, col = self.num_nodes, self.crow, self.col
        kinds = (crow.dtype, col.dtype, self.inv_sqrt_degree.dtype)
        shapes = (tuple(crow.shape), tuple(self.inv_sqrt_degree.shape), col.dim())
        if kinds != (torch.int64, torch.int32, torch.float32) or shapes != ((nodes + 1,), (nodes,), 1):
            _fail("crow int64 [N+1], col int32 [nnz], inv_sqrt_degree float32 [N]", f"{kinds}, {shapes} in {path}")
        if int(crow[0]) != 0 or int(crow[-1]) != col.numel() or bool((crow.diff() < 0).any()):
            _fail("crow to rise from 0 to nnz", f"{int(crow[0])} .. {int(crow[-1])} in {path}")
        if col.numel() and (int(col.min()) < 0 or int(col.max()) >= nodes):
            _fail(f"col in [0, {nodes})", f"{int(col.min())} .. {int(col.max())} in {path}")
