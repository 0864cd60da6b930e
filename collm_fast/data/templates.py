"""Prompt templates: the built-in ones, `@FILE`, and the parse of the five tags. Tokens: data/prompts.py. Floor F2."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TAGS = ("<UserID>", "<ItemIDList>", "<ItemTitleList>", "<TargetItemID>", "<TargetItemTitle>")
NEEDED = {1: ("<ItemTitleList>", "<TargetItemTitle>"), 2: ("<UserID>", "<TargetItemID>")}
FORBIDDEN = {1: ("<UserID>", "<ItemIDList>", "<TargetItemID>"), 2: ()}

# The published prompts, with their backslash and n as two characters: the models were tuned on exactly that.
# Source: CoLLM (arXiv 2310.19488), table I and the authors' prompt files. `plural`, `singular` name the domain.
_STAGE1 = (
    "#Question: A user has given high ratings to the following {plural}: <ItemTitleList>. Leverage the information to "
    'predict whether the user would enjoy the {singular} titled <TargetItemTitle>? Answer with "Yes" or "No". '
    "\\n#Answer:"
)
_STAGE2 = (
    "#Question: A user has given high ratings to the following {plural}: <ItemTitleList>. Additionally, we have "
    "information about the user's preferences encoded in the feature <UserID>. Using all available information, make a "
    "prediction about whether the user would enjoy the {singular} titled <TargetItemTitle> with the feature "
    '<TargetItemID>? Answer with "Yes" or "No". \\n#Answer:'
)
DOMAINS = {"movie": ("movies", "movie"), "book": ("books", "book"), "item": ("items", "item")}


@dataclass(frozen=True)
class PromptTemplate:
    """One or several wordings of a stage's prompt, each a sequence of pieces: a tag of `TAGS`, or text.

    With several wordings every (user, history) group keeps one of them, so a group still shares its prefix.
    """

    variants: tuple[tuple[str, ...], ...]
    stage: int

    @property
    def pieces(self) -> tuple[str, ...]:
        """The pieces of the first wording."""
        return self.variants[0]

    @property
    def ends(self) -> tuple[str, ...]:
        """The text of each wording after its last tag: what an answer follows."""
        return tuple("" if pieces[-1] in TAGS else pieces[-1] for pieces in self.variants)

    @property
    def texts(self) -> tuple[str, ...]:
        """Each wording as it was written; `from_texts` undoes it."""
        return tuple("".join(pieces) for pieces in self.variants)

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, stage: int) -> PromptTemplate:
        """A template of several wordings.

        Raises: ValueError as `parse`.
        """
        return cls(tuple(_parse(text, stage) for text in texts), stage)

    @classmethod
    def parse(cls, text: str, *, stage: int) -> PromptTemplate:
        """One wording from its text.

        Raises: ValueError that names the tag and the stage: stage 1 needs <ItemTitleList> and <TargetItemTitle> and
        has no embeddings for the ID tags; stage 2 needs <UserID> and <TargetItemID>.
        """
        return cls.from_texts([text], stage=stage)

    @classmethod
    def load(cls, source: str | None, domain: str, *, stage: int) -> PromptTemplate:
        """The built-in template of a domain (None), a file (`@FILE`), or the text itself.

        In a file every line is a wording, as in the authors' files; empty lines are skipped, equal lines count once.
        """
        if source is None:
            return cls.parse(builtin(domain, stage), stage=stage)
        if not source.startswith("@"):
            return cls.parse(source, stage=stage)
        file = Path(source[1:])
        if not file.is_file():
            raise ValueError(f"prompt: expected a file for {source!r}, got no such file")
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt: expected UTF-8 in {file}, got {error}") from error
        texts = dict.fromkeys(line.rstrip("\r") for line in lines if line.strip())
        if not texts:
            raise ValueError(f"prompt: expected a template in {file}, got an empty file")
        return cls.from_texts(texts, stage=stage)


def builtin(domain: str, stage: int) -> str:
    """The published prompt text of a domain ("movie", "book", "item") and stage (1 or 2)."""
    if domain not in DOMAINS:
        raise ValueError(f"prompt: expected a domain of {', '.join(DOMAINS)}, got {domain!r}")
    if stage not in NEEDED:
        raise ValueError(f"prompt: expected stage 1 or 2, got {stage!r}")
    plural, singular = DOMAINS[domain]
    return (_STAGE1 if stage == 1 else _STAGE2).format(plural=plural, singular=singular)


def _parse(text: str, stage: int) -> tuple[str, ...]:
    if stage not in NEEDED:
        raise ValueError(f"prompt: expected stage 1 or 2, got {stage!r}")
    for tag in NEEDED[stage]:
        if tag not in text:
            raise ValueError(f"prompt: expected {tag} in the stage {stage} template, got {text!r}")
    for tag in FORBIDDEN[stage]:
        if tag in text:
            raise ValueError(f"prompt: expected no {tag} in the text-only stage {stage} template, got {text!r}")
    pieces = re.split("(" + "|".join(map(re.escape, TAGS)) + ")", text)
    return tuple(piece for piece in pieces if piece)
