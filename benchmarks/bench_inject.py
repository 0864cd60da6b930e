"""Times embed_inject, gather_rows and scatter_rows against what torch users write instead.

Sizes are a training step's: T packed tokens, H columns, S mapped rows at `places` places each. Peers: `where` (two
gathers and a select, the reference), `index_put` (the embedding, then rows written over it), `masked_scatter` (the
official CoLLM code). For the sums: `index_add` (not deterministic on a GPU) and `embedding_dense` (its backward).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import harness
import torch
from torch import Tensor
from torch.nn.functional import embedding

from collm_fast import ops, reference

Injector = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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


def injection(suite: harness.Suite, T: int, H: int, S: int, V: int, dtype: torch.dtype) -> None:
    """T tokens of which 2 S are places of S rows."""
    table, rows = suite.tensor(V, H, dtype=dtype, scale=0.1), suite.tensor(S, H, dtype=dtype, scale=0.1)
    token_ids = suite.integers(0, V, T)
    row_index = torch.full((T,), -1, dtype=torch.int32, device=suite.device)
    places = suite.integers(0, T // (2 * S), 2 * S) + torch.arange(2 * S, device=suite.device) * (T // (2 * S))
    row_index[places] = torch.arange(2 * S, dtype=torch.int32, device=suite.device) % S
    name, moved = f"inject T={T} H={H} S={S}", 2 * T * H * table.element_size()
    impls = {impl: partial(fn, token_ids, table, rows, row_index) for impl, fn in INJECTORS.items()}
    # A copy: exact in every dtype.
    suite.case(name, "fwd", dtype, impls, expected=impls["where"], work=harness.Work(bytes=moved), tolerance=0.0)
    grad = suite.tensor(T, H, dtype=dtype)
    both = {
        impl: harness.backward(lambda r, fn=fn: fn(token_ids, table, r, row_index), [rows], grad)
        for impl, fn in INJECTORS.items()
    }
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
        {"ours": lambda: ops.gather_rows(table, index), "embedding": lambda: embedding(index, table)},
        expected=lambda: table[index],
        work=harness.Work(bytes=2 * grad.nbytes),
        tolerance=0.0,
    )


def cases(suite: harness.Suite) -> None:
    vocabulary, dtypes = (2048, (torch.float32,)) if suite.options.quick else (49_152, (torch.float32, torch.bfloat16))
    for dtype in dtypes:
        injection(suite, 2560, 576, 24, vocabulary, dtype)  # SmolLM2-135M, 16 prompts
        injection(suite, 2560, 4096, 24, vocabulary // 8, dtype)  # the width of a 7B model
        sums(suite, 2048, 64, 10_000, dtype)  # one batch of a collaborative model
        sums(suite, 65_536, 64, 1_000, dtype)  # popular items: many places a row


if __name__ == "__main__":
    raise SystemExit(harness.main(cases, __doc__))
