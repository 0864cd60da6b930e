"""A LightGCN layer by cuSPARSE with everything kept that can be kept: the peer to beat on a GPU.

What a careful user of the library would do once for each graph (arXiv 2605.31500): int32 indices and normalised
values, one matrix descriptor, one workspace, `cusparseSpMM_preprocess`, and the fastest of the algorithms for CSR. A
call sets two pointers and multiplies on torch's current stream. torch.sparse does all of it again at every product.
Not here: the other peers (`propagate_peers.py`).
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import torch
from ceilings import sample
from propagate_peers import values
from torch import Tensor

from collm_fast import BipartiteGraph

# Values of the enumerations in cusparse.h and library_types.h, the same in CUDA 12 and 13.
_NON_TRANSPOSE, _INDEX_32I, _BASE_ZERO, _ORDER_ROW = 0, 2, 0, 2
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
ALGORITHMS = {"CSR_ALG1": 4, "CSR_ALG2": 6, "CSR_ALG3": 12}

# handle, opA, opB, alpha, matA, matB, beta, matC, computeType, alg: what the three forms of SpMM begin with.
_SPMM = [c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int]
_SIGNATURES: dict[str, list[Any]] = {
    "cusparseCreate": [POINTER(c_void_p)],
    "cusparseDestroy": [c_void_p],
    "cusparseSetStream": [c_void_p, c_void_p],
    "cusparseCreateCsr": [POINTER(c_void_p), *[c_int64] * 3, *[c_void_p] * 3, *[c_int] * 4],
    "cusparseDestroySpMat": [c_void_p],
    "cusparseCreateDnMat": [POINTER(c_void_p), *[c_int64] * 3, c_void_p, c_int, c_int],
    "cusparseDnMatSetValues": [c_void_p, c_void_p],
    "cusparseDestroyDnMat": [c_void_p],
    "cusparseSpMM_bufferSize": [*_SPMM, POINTER(c_size_t)],
    "cusparseSpMM_preprocess": [*_SPMM, c_void_p],
    "cusparseSpMM": [*_SPMM, c_void_p],
}


def library() -> ctypes.CDLL:
    """libcusparse as torch has loaded it, its functions typed. Raises: ImportError where there is none."""
    try:
        found = ctypes.CDLL("libcusparse.so.12")
    except OSError as error:
        raise ImportError(f"cusparse: expected libcusparse.so.12 on the library path, got {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, c_int
    found.cusparseGetErrorString.argtypes, found.cusparseGetErrorString.restype = [c_int], c_char_p
    return found


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


class CachedCsr:
    """D^-1/2 A D^-1/2 in cuSPARSE's CSR, for tables [N, D] of float32, float16 or bfloat16 on one GPU.

    Products accumulate in float32. `algorithm` is the name of the fastest, tried once here.
    """

    def __init__(self, graph: BipartiteGraph, D: int, dtype: torch.dtype, device: torch.device) -> None:
        nodes, nnz = graph.num_nodes, graph.col.numel()
        if nnz >= 2**31:
            raise ValueError(f"cusparse: expected fewer than 2^31 stored edges for int32 offsets, got {nnz}")
        self.library, self.device, self.dtype, self.shape = library(), device, dtype, (nodes, D)
        here = graph.to(device)
        self.parts = (here.crow.int(), here.col, values(here).to(dtype))
        self._handles: list[tuple[str, c_void_p]] = []
        weakref.finalize(self, _destroy, self.library, self._handles)
        self.handle = self._create("cusparseCreate", "cusparseDestroy")
        pointers = (part.data_ptr() for part in self.parts)
        kinds = (_INDEX_32I, _INDEX_32I, _BASE_ZERO, _TYPES[dtype])
        self.matrix = self._create("cusparseCreateCsr", "cusparseDestroySpMat", nodes, nodes, nnz, *pointers, *kinds)
        empty = torch.zeros(self.shape, dtype=dtype, device=device)
        dense = (
            "cusparseCreateDnMat",
            "cusparseDestroyDnMat",
            nodes,
            D,
            D,
            empty.data_ptr(),
            _TYPES[dtype],
            _ORDER_ROW,
        )
        self.table, self.result = self._create(*dense), self._create(*dense)
        self.one, self.zero = c_float(1.0), c_float(0.0)
        self.algorithm, self.workspace = self._fastest(empty)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            reason = self.library.cusparseGetErrorString(status).decode()
            raise RuntimeError(f"cusparse: expected status 0 of {name}, got {status} ({reason})")

    def _create(self, create: str, destroy: str, *arguments: Any) -> c_void_p:
        created = c_void_p()
        self._call(create, byref(created), *arguments)
        self._handles.append((destroy, created))
        return created

    def _product(self, name: str, algorithm: str, last: Any) -> None:
        scalars = byref(self.one), byref(self.zero)
        operations, compute = (_NON_TRANSPOSE, _NON_TRANSPOSE), _TYPES[torch.float32]
        operands = scalars[0], self.matrix, self.table, scalars[1], self.result
        self._call(name, self.handle, *operations, *operands, compute, ALGORITHMS[algorithm], last)

    def _prepare(self, algorithm: str) -> Tensor:
        """The workspace of an algorithm, with what it wants to know of the matrix in it."""
        size = c_size_t()
        self._product("cusparseSpMM_bufferSize", algorithm, byref(size))
        workspace = torch.empty(max(size.value, 1), dtype=torch.uint8, device=self.device)
        self._product("cusparseSpMM_preprocess", algorithm, workspace.data_ptr())
        return workspace

    def _fastest(self, table: Tensor) -> tuple[str, Tensor]:
        best, chosen, refused = math.inf, None, []
        for algorithm in ALGORITHMS:
            try:
                self.algorithm, self.workspace = algorithm, self._prepare(algorithm)
                self.multiply(table)
                seconds = min(sample(lambda: self.multiply(table), 3, self.device)[0] for _ in range(5))
            except RuntimeError as error:
                refused.append(f"{algorithm}: {str(error).removeprefix('cusparse: ')}")
                continue
            if seconds < best:
                best, chosen = seconds, algorithm
        if chosen is None:
            why = "; ".join(refused)
            raise RuntimeError(f"cusparse: expected one of the algorithms to serve {self.dtype}, got {why}")
        # A workspace is active for one algorithm at a time: the chosen one's is made again, as the last.
        return chosen, self._prepare(chosen)

    def multiply(self, x: Tensor) -> Tensor:
        """The next layer [N, D], in the dtype of the tables."""
        x = x.to(self.dtype).contiguous()
        if x.shape != self.shape or x.device != self.device:
            raise ValueError(f"cusparse: expected x of shape {list(self.shape)} on {self.device}, got {list(x.shape)}")
        out = torch.empty_like(x)
        self._call("cusparseSetStream", self.handle, _stream(self.device))
        self._call("cusparseDnMatSetValues", self.table, x.data_ptr())
        self._call("cusparseDnMatSetValues", self.result, out.data_ptr())
        self._product("cusparseSpMM", self.algorithm, self.workspace.data_ptr())
        return out


def _destroy(library: ctypes.CDLL, handles: list[tuple[str, c_void_p]]) -> None:
    destroy: Callable[[c_void_p], int]
    for name, handle in reversed(handles):
        destroy = getattr(library, name)
        destroy(handle)
