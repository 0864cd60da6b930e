"""A billion edges on paper: bytes, traffic and time on one host and divided among ranks.

The rates are those that growth.py measured; every other number is a line of arithmetic below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GB = 1e9
EDGES = 10**9
# What a user and an item have on average in the graphs of graphs.py.
USER_DEGREE, ITEM_DEGREE = 25, 40
# One direction of a 100 Gb/s network card, and the memory of one H100 as a copy measures it.
NETWORK, HBM = 12.5e9, 3.0e12


def row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [row(head), "|" + "---|" * len(head), *map(row, rows), ""]


def short(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 1000:
        return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def gb(value: float) -> str:
    return f"{value / GB:.2f}"


def lines(result: dict[str, Any]) -> list[str]:
    D, K = result["D"], result["K"]
    users, items = EDGES // USER_DEGREE, EDGES // ITEM_DEGREE
    N, nnz = users + items, 2 * EDGES
    graph = 8 * (N + 1) + 4 * nnz + 4 * N
    f32, bf16 = N * D * 4, N * D * 2
    largest = max(result["sizes"], key=lambda size: int(size["edges"]))
    rates = {name: largest["stages"][stage]["gathered_bytes_per_s"] for name, stage in STAGES.items()}
    # Rows gathered, columns read, x read and a table written.
    layer = {"float32": (nnz * D * 4, 4 * nnz + 2 * f32), "bfloat16": (nnz * D * 2, 4 * nnz + f32 + bf16)}
    here = {name: gathered / rates[name] for name, (gathered, _) in layer.items()}
    return [
        "## A billion edges, on paper",
        "",
        f"The same shape: {users:,} users, {items:,} items, N = {N:,}, nnz = {nnz:,}, D = {D}, K = {K}; GB are 10^9.",
        "",
        "One host:",
        "",
        *table(["what", "bytes", "GB"], single_host(N, nnz, graph, f32, bf16)),
        f"A file of {gb(graph)} GB opens mapped (`BipartiteGraph.load(path, mmap=True)`): `crow` is read, the columns "
        "where they are used. Building takes about "
        f"{short(largest['stages']['build']['seconds'] * EDGES / largest['edges'])} at the rate of the largest size.",
        "",
        f"A layer moves, and takes at the rate that the forward gathered at with {largest['edges']:,} edges here, "
        f"{result['threads']} thread(s) ({gb(rates['float32'])} GB/s in float32, {gb(rates['bfloat16'])} GB/s in "
        f"bfloat16; that table was out of every cache as well), or at {HBM / 1e12:.0f} TB/s, an H100's memory:",
        "",
        *table(
            ["layers in", "gathered GB", "streamed GB", "a layer here", f"{K} layers here", f"{K} layers at 3 TB/s"],
            [
                [name, gb(g), gb(s), short(here[name]), short(K * here[name]), short(K * (g + s) / HBM)]
                for name, (g, s) in layer.items()
            ],
        ),
        "Training fits a host of 128 GB; one GPU of 80 GB holds the forward, but not Adam's state beside it. Divided "
        "among P ranks by ranges of users and of items (`collm_fast.distributed`), layers kept and sent in bfloat16: a "
        "user is in the halo of a rank unless none of its edges end there, so a share "
        f"1 - (1 - 1/P)^{USER_DEGREE} of the foreign users and 1 - (1 - 1/P)^{ITEM_DEGREE} of the foreign items; with "
        "few ranks nearly every row travels to nearly every rank.",
        "",
        *table(
            [
                "P",
                "graph and send lists",
                "4 tables",
                "scratch",
                "GB a rank",
                "received a layer, GB",
                "at 12.5 GB/s",
                "gather here",
                "gather at 3 TB/s",
            ],
            [ranks(P, users, items, graph, D, f32, here["bfloat16"], sum(layer["bfloat16"])) for P in (2, 4, 8, 16)],
        ),
        "The exchange of one chain hides behind the sum of the other, so a layer takes the larger of the two times: on "
        "hosts like this one the gather, on GPUs over such a network the exchange, by far; there only NVLink (hundreds "
        "of GB/s) keeps a layer near the gather.",
        "",
        *epochs(result, K, here["bfloat16"], sum(layer["bfloat16"])),
    ]


# What the page calls a storage dtype: the stage that measured it.
STAGES = {"float32": "forward", "bfloat16": "forward bf16"}


def single_host(N: int, nnz: int, graph: int, f32: int, bf16: int) -> list[list[str]]:
    needs = [
        ("crow", "8 (N + 1)", 8 * (N + 1)),
        ("col", "4 nnz", 4 * nnz),
        ("inv_sqrt_degree", "4 N", 4 * N),
        ("**graph**", "", graph),
        ("building it, above the ids", "graph + 8 a pair", graph + 4 * nnz),
        ("a table in float32", "4 N D", f32),
        ("forward, float32 layers", "graph + x, result + 1 table", graph + 3 * f32),
        ("forward, bfloat16 layers", "graph + x, result + 1 half table", graph + 2 * f32 + bf16),
        ("training, float32 layers", "graph + embedding, gradient, 2 moments + 1 table", graph + 5 * f32),
        ("training, bfloat16 layers", "graph + embedding, gradient, 2 moments + 1 half table", graph + 4 * f32 + bf16),
    ]
    return [[name, formula, gb(size)] for name, formula, size in needs]


def ranks(P: int, users: int, items: int, graph: int, D: int, f32: int, here: float, moved: int) -> list[str]:
    """One rank of P, its share of everything taken as equal."""
    foreign = 1 - 1 / P
    halo = users * foreign * (1 - foreign**USER_DEGREE) + items * foreign * (1 - foreign**ITEM_DEGREE)
    own = (users + items) / P
    # On average a rank sends as many rows as it receives; each is an int64 in a list.
    lists = graph / P + 8 * halo
    # Three of the four half tables [own | halo] of two chains, and what is being sent.
    scratch = 1.5 * (own + halo) * D * 2 + halo * D * 2
    received = halo * D * 2
    cells = [gb(lists), gb(4 * f32 / P), gb(scratch), gb(lists + 4 * f32 / P + scratch), gb(received)]
    return [str(P), *cells, short(received / NETWORK), short(here / P), short(moved / P / HBM)]


def epochs(result: dict[str, Any], K: int, here: float, moved: int) -> list[str]:
    fit = next(f for f in result["fits"] if (f["stage"], f["what"]) == ("BPR epoch bf16", "seconds"))
    small, large = result["batch_size"], 1 << 20
    steps = -(-EDGES // large)
    return [
        f"An epoch: at batch {small} it has {-(-EDGES // small):,} steps, and the fit gives "
        f"{short(fit['c'] * EDGES ** fit['exponent'])} on this machine: the batch has to grow with the graph. At batch "
        f"{large:,} it has {steps:,} steps of {2 * K} layers, none of them trimmed: {short(steps * 2 * K * here)} at "
        f"this machine's rate, {short(steps * 2 * K * moved / HBM)} at 3 TB/s, divided by P where the exchange hides.",
        "",
    ]
