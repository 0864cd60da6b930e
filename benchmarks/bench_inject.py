"""Times embed_inject, gather_rows and scatter_rows against what torch users write instead, and against a plain gather.

Sizes are a training step's: T packed tokens, H columns, S mapped rows at two places each. Peers: `where` (two gathers
and a select, the reference), `index_put` (the embedding, then rows written over it), `masked_scatter` (the official
CoLLM code). The floor is the gather alone, of the same rows out of one table that holds all, with the places known:
`gather` into new memory as the others, `gather_out` and `memcpy_out` into memory that exists (torch's and NumPy's).
For the sums: `index_add` (not deterministic on a GPU) and `embedding_dense` (its backward).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import harness
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from collm_fast import ops, reference

Injector = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Gather = Callable[[], Tensor]


def index_put(token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor) -> Tensor:
    out = embedding(token_ids, table)
    (places,) = torch.where(row_index >= 0)
    return out.index_put((places,), rows[row_index[places].long()])


def masked_scatter(token_ids: Tensor, table: Tensor, rows: Tensor, row_index: Tensor) -> Tensor:
    mask = row_index >= 0
    return embedding(token_ids, table).masked_scatter(mask[:, None], rows[row_index[mask].long()])


INJECTORS: dict[str, Injector] = {
    "ours": ops.embed_inject,
    "where": reference.embed_inject,
    "index_put": index_put,
    "masked_scatter": masked_scatter,
}


def gathers(table: Tensor, index: Tensor) -> dict[str, Gather]:
    """table[index] the fastest ways there are; an `_out` writes over its last result."""
    out = torch.empty(len(index), table.shape[1], dtype=table.dtype, device=table.device)
    ways: dict[str, Gather] = {
        "gather": lambda: embedding(index, table),
        "gather_out": lambda: torch.index_select(table, 0, index, out=out),
    }
    if table.device.type == "cpu":
        # NumPy knows no bfloat16, and a copy no number format. Clipping spares it a buffer: no index needs any.
        bits = torch.int32 if table.element_size() == 4 else torch.int16
        source, where, target = table.view(bits).numpy(), index.numpy(), out.view(bits).numpy()

        def memcpy_out() -> Tensor:
            np.take(source, where, axis=0, out=target, mode="clip")
            return out

        ways["memcpy_out"] = memcpy_out
    return ways


def injection(suite: harness.Suite, T: int, H: int, S: int, V: int, dtype: torch.dtype) -> None:
    """T tokens of which 2 S are places of S rows."""
    name = f"inject T={T} H={H} S={S}"
    if not suite.wanted(name, ("fwd", "fwd+bwd"), dtype):
        return
    everything = suite.tensor(V + S, H, dtype=dtype, scale=0.1)
    table, rows = everything[:V], everything[V:].clone()
    token_ids = suite.integers(0, V, T)
    row_index = torch.full((T,), -1, dtype=torch.int32, device=suite.device)
    places = suite.integers(0, T // (2 * S), 2 * S) + torch.arange(2 * S, device=suite.device) * (T // (2 * S))
    row_index[places] = torch.arange(2 * S, dtype=torch.int32, device=suite.device) % S
    moved = 2 * T * H * table.element_size()
    floor = gathers(everything, torch.where(row_index >= 0, row_index + V, token_ids))
    impls = {impl: partial(fn, token_ids, table, rows, row_index) for impl, fn in INJECTORS.items()} | floor
    # A copy: exact in every dtype.
    suite.case(name, "fwd", dtype, impls, expected=impls["where"], work=harness.Work(bytes=moved), tolerance=0.0)
    grad, slot = suite.tensor(T, H, dtype=dtype), row_index[places]

    def with_sums(gather: Gather) -> list[Tensor]:
        return [gather(), torch.zeros_like(rows).index_add_(0, slot, grad[places])]

    both = {
        impl: harness.backward(lambda r, fn=fn: fn(token_ids, table, r, row_index), [rows], grad)
        for impl, fn in INJECTORS.items()
    }
    both |= {impl: partial(with_sums, gather) for impl, gather in floor.items()}
    truth = [
        reference.embed_inject(token_ids, table, rows, row_index),
        reference.scatter_rows(grad.double(), row_index, S),
    ]
    more = 3 * S * H * table.element_size()  # the gradient at the places, read, and its sums, written
    suite.case(name, "fwd+bwd", dtype, both, expected=lambda: truth, work=harness.Work(bytes=moved + more))


def sums(suite: harness.Suite, places: int, H: int, num_rows: int, dtype: torch.dtype) -> None:
    grad, index = suite.tensor(places, H, dtype=dtype), suite.integers(0, num_rows, places)

    def index_add() -> Tensor:
        return torch.zeros(num_rows, H, dtype=dtype, device=suite.device).index_add_(0, index, grad)

    def embedding_dense() -> Tensor:
        return torch.ops.aten.embedding_dense_backward(grad, index, num_rows, -1, False)

    impls = {
        "ours": lambda: ops.scatter_rows(grad, index, num_rows),
        "index_add": index_add,
        "embedding_dense": embedding_dense,
    }
    suite.case(
        f"scatter {places} x {H} -> {num_rows}",
        "fwd",
        dtype,
        impls,
        expected=lambda: reference.scatter_rows(grad.double(), index, num_rows),
        work=harness.Work(bytes=(places + num_rows) * H * grad.element_size()),
    )
    table = suite.tensor(num_rows, H, dtype=dtype)
    suite.case(
        f"gather {places} x {H} <- {num_rows}",
        "fwd",
        dtype,
        {"ours": lambda: ops.gather_rows(table, index), **gathers(table, index)},
        expected=lambda: table[index],
        work=harness.Work(bytes=2 * grad.nbytes),
        tolerance=0.0,
    )


def cases(suite: harness.Suite) -> None:
    vocabulary, dtypes = (2048, (torch.float32,)) if suite.options.quick else (49_152, (torch.float32, torch.bfloat16))
    for dtype in dtypes:
        injection(suite, 2560, 576, 24, vocabulary, dtype)  # SmolLM2-135M, 16 prompts
        injection(suite, 2560, 1536, 24, vocabulary, dtype)  # Qwen2-1.5B
        injection(suite, 2560, 4096, 24, vocabulary // 8, dtype)  # the width of a 7B model
        sums(suite, 1, 64, 10, dtype)  # what a call costs
        sums(suite, 2048, 64, 10_000, dtype)  # one batch of a collaborative model
        sums(suite, 65_536, 64, 1_000, dtype)  # popular items: many places a row


if __name__ == "__main__":
    raise SystemExit(harness.main(cases, __doc__))
