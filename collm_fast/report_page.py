"""A report's blocks as Markdown and as one self-contained HTML file. Knows nothing about runs. Floor F3."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 or 2."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Pre:
    """Text to be shown as it is."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first column is text, the others are numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Image:
    """A PNG: linked by its name in Markdown, embedded in HTML."""

    name: str
    caption: str
    png: bytes


Block = Heading | Paragraph | Items | Pre | Table | Image

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1917; background: #fafaf9; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h2 { border-bottom: 1px solid #e7e5e4; padding-bottom: .25rem; }
ul { padding-left: 1.2rem; } li { margin: .2rem 0; }
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; background: #fff; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e7e5e4; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { background: #f5f5f4; }
pre { background: #f5f5f4; border: 1px solid #e7e5e4; border-radius: 6px; padding: .7rem; white-space: pre-wrap;
      overflow-wrap: anywhere; font-size: .85rem; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; color: #57534e; }
img { max-width: 100%; height: auto; border: 1px solid #e7e5e4; border-radius: 6px; background: #fff; }
"""


def to_html(blocks: Sequence[Block], title: str) -> str:
    """One HTML file without any reference outside itself; every text is escaped."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_safe(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def to_markdown(blocks: Sequence[Block]) -> str:
    """The same as Markdown; images are links to the files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def printable(text: str) -> str:
    """Text without control characters (a title may hold any): each becomes a visible escape."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _safe(text: str) -> str:
    return html.escape(printable(text))


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_safe(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{_safe(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>\n" + "\n".join(f"<li>{_safe(text)}</li>" for text in block.texts) + "\n</ul>"
    if isinstance(block, Pre):
        return f"<pre>{_safe(block.text)}</pre>"
    if isinstance(block, Image):
        data = base64.b64encode(block.png).decode()
        return (
            f'<figure><img alt="{_safe(block.caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_safe(block.caption)}</figcaption></figure>"
        )
    head = "".join(f'<th scope="col">{_safe(name)}</th>' for name in block.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    return (
        f'<div class="scroll"><table>\n<caption>{_safe(block.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_line(block.text)}"
    if isinstance(block, Paragraph):
        return _line(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_line(text)}" for text in block.texts)
    if isinstance(block, Pre):
        # A fence longer than any run of backticks inside cannot be closed by the text.
        fence = "`" * max(3, 1 + max((len(run) for run in _backticks(block.text)), default=0))
        return f"{fence}\n{printable(block.text)}\n{fence}"
    if isinstance(block, Image):
        return f"![{_line(block.caption)}]({block.name})"
    lines = [block.header, ["---"] + ["---:"] * (len(block.header) - 1), *block.rows]
    body = "\n".join("| " + " | ".join(_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{_line(block.caption)}**\n\n{body}"


def _backticks(text: str) -> list[str]:
    runs, run = [], ""
    for c in text + " ":
        if c == "`":
            run += c
        elif run:
            runs.append(run)
            run = ""
    return runs


def _line(text: str) -> str:
    return printable(" ".join(text.split("\n"))).replace("<", "&lt;")
