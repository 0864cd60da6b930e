"""The prompts of a split as flat token arrays with explicit slots, tokenised once, in bulk, and cached on disk.

A slot is a position whose embedding comes from the collaborative model; it is data (`slot_role`, `slot_id`), never
found by searching for a token. Templates are data/templates.py, the layout of a batch is data/packing.py. Floor F2.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_fast.data.dataset import Split
from collm_fast.data.encoding import Encoder
from collm_fast.data.ragged import I64, Array, offsets_of, spans, take_ragged
from collm_fast.data.templates import PromptTemplate
from collm_fast.io.atomic import write_atomic

__all__ = ["HISTORY", "TARGET", "TEXT", "USER", "PromptTemplate", "Prompts", "cached_tokenize", "tokenize"]

log = logging.getLogger(__name__)
TEXT, USER, HISTORY, TARGET = 0, 1, 2, 3
_ROLES = {"<UserID>": USER, "<TargetItemID>": TARGET}
# What the authors' code writes for an empty history, spelling included: the models were tuned on it.
NO_HISTORY = "unkow"
_FORMAT = "collm_fast prompts 2"


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts of n rows, flat: row r is the positions offsets[r]..offsets[r + 1].

    offsets [n + 1] int64; token_ids [total] int32, 0 at slots; slot_role [total] uint8: 0 text, 1 user, 2 history
    item, 3 target item; slot_id [total] int32: the user or item id, 0 at text; slot_part [total] uint8: which of the
    tokens_per_id tokens of a slot; group [n] int64: rows of one user, history and wording have one number;
    uid, iid, label [n] int64.
    """

    offsets: I64
    token_ids: NDArray[np.int32]
    slot_role: NDArray[np.uint8]
    slot_id: NDArray[np.int32]
    slot_part: NDArray[np.uint8]
    group: I64
    uid: I64
    iid: I64
    label: I64
    tokens_per_id: int = 1

    def __len__(self) -> int:
        return len(self.uid)

    def take(self, rows: Array | Sequence[int]) -> Prompts:
        """The rows at `rows` (int64 positions or a bool mask), in that order; group numbers stay as they are."""
        rows = np.asarray(rows)
        index = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows.astype(np.int64)
        offsets, places = take_ragged(self.offsets, np.arange(len(self.token_ids)), index)
        flat = {name: getattr(self, name)[places] for name in ("token_ids", "slot_role", "slot_id", "slot_part")}
        rowwise = {name: getattr(self, name)[index] for name in ("group", "uid", "iid", "label")}
        return replace(self, offsets=offsets, **flat, **rowwise)

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, atomically."""
        from safetensors.numpy import save_file

        arrays = {
            f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self) if f.name != "tokens_per_id"
        }
        # One key: safetensors writes several in an order of chance, and equal prompts should be equal files.
        metadata = {"collm_fast": json.dumps({"format": _FORMAT, "tokens_per_id": self.tokens_per_id})}
        return write_atomic(path, lambda file: save_file(arrays, file, metadata))

    @classmethod
    def load(cls, path: Path | str) -> Prompts:
        """Read what `save` wrote. Raises: ValueError for any other file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("collm_fast", "{}"))
                if header.get("format") != _FORMAT:
                    raise ValueError(f"Prompts.load: expected {_FORMAT!r} in {path}, got {header.get('format')!r}")
                arrays = {f.name: file.get_tensor(f.name) for f in fields(cls) if f.name != "tokens_per_id"}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"Prompts.load: expected saved prompts in {path}, got {error}") from error
        return cls(**arrays, tokens_per_id=header["tokens_per_id"])


def tokenize(
    split: Split,
    template: PromptTemplate,
    tokenizer: Any,
    titles: Sequence[str],
    *,
    history_length: int,
    tokens_per_id: int = 1,
) -> Prompts:
    """Write and tokenise the prompt of every row of a split.

    The history is the last `history_length` liked items, oldest first. <ItemTitleList> becomes the quoted titles
    joined by ", " ("unkow" when there are none), <ItemIDList> as many slots joined by ", ", <TargetItemTitle> the
    quoted title. An id takes `tokens_per_id` slots with "." between them. Titles are text only: tags and special tokens
    inside one are never seen as such; special tokens written in the template are. Text between two slots is tokenised
    as one string, so the tokens are those of the whole prompt with a special token at each slot. Of several wordings
    each (user, history) has one, whatever other rows are tokenised beside it.

    Args: tokenizer: a transformers tokenizer; its beginning-of-sequence token is added if it adds one itself.
    Raises: ValueError for an item id without a title or a negative history_length.
    Source: CoLLM (arXiv 2310.19488), section 4.1, and the authors' published code for what the paper leaves open.
    """
    largest = max(int(split.iid.max(initial=0)), int(split.his.max(initial=0)))
    if largest >= len(titles):
        raise ValueError(f"tokenize: expected a title for every item id, got id {largest} and {len(titles)} titles")
    if history_length < 0 or not 1 <= tokens_per_id <= 255:
        got = f"{history_length} and {tokens_per_id}"
        raise ValueError(f"tokenize: expected history_length >= 0 and tokens_per_id in [1, 255], got {got}")
    window = _last_items(split, history_length)
    group = _groups(split.uid, window)
    encoder = Encoder(tokenizer)
    rows = _Rows(encoder, titles, tokens_per_id)
    variants = [encoder.split_special(pieces) for pieces in template.variants]
    wording = _wordings(split.uid, window, len(variants))
    for row in range(len(split)):
        rows.write(variants[wording[row]], int(split.uid[row]), int(split.iid[row]), window[row].tolist())
    return rows.finish(split, group)


def _last_items(split: Split, length: int) -> I64:
    """[n, length] int64: the last items of each history, right-aligned, 0 where there are fewer."""
    end = split.his_offsets[1:, None]
    place = end - length + np.arange(length)[None, :]
    inside = place >= split.his_offsets[:-1, None]
    padded = np.append(split.his, 0)  # an empty history array would have nothing to index
    return np.where(inside, padded[np.maximum(place, 0)], 0)


def _groups(uid: I64, window: I64) -> I64:
    """[n] int64: equal for equal (user, history), numbered in the order of first occurrence."""
    if len(uid) == 0:
        return np.zeros(0, dtype=np.int64)
    key = np.concatenate([uid[:, None], window], axis=1)
    _, first, inverse = np.unique(key, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def _wordings(uid: I64, window: I64, count: int) -> list[int]:
    """[n] which of `count` wordings a row has: a hash of its user and history, so that no other row matters."""
    if count == 1:
        return [0] * len(uid)
    key = np.ascontiguousarray(np.concatenate([uid[:, None], window], axis=1), dtype="<i8")
    return [int.from_bytes(hashlib.sha256(row[row > 0].tobytes()).digest()[:8], "little") % count for row in key]


class _Rows:
    """Collects rows as items, a text (by number) or a slot, and assembles them after one bulk tokenisation."""

    def __init__(self, encoder: Encoder, titles: Sequence[str], tokens_per_id: int) -> None:
        self.encoder, self.tokens_per_id = encoder, tokens_per_id
        # As in the published code: an empty title is left out of the list, spaces around the target's go.
        self.listed = [f'"{title}"' if title else "" for title in titles]
        self.target = ['"' + title.strip(" ") + '"' for title in titles]
        self.numbers: dict[tuple[str, bool] | int, int] = {}  # (text, is first) or a special token's id -> number
        self.text: list[int] = []  # per item: the number of its text, -1 for a slot
        self.role: list[int] = []
        self.id: list[int] = []
        self.part: list[int] = []
        self.row_end: list[int] = [0]
        self.buffer = ""
        self.is_first = True

    def write(self, pieces: Sequence[str | int], user: int, item: int, window: list[int]) -> None:
        self.is_first = True
        history = [place for place in window if place]
        for piece in pieces:
            if isinstance(piece, int):
                self._flush()
                self._text(piece)
            elif piece in _ROLES:
                self._slot(_ROLES[piece], user if piece == "<UserID>" else item)
            elif piece == "<ItemIDList>":
                for nth, place in enumerate(history):
                    self.buffer += ", " if nth else ""
                    self._slot(HISTORY, place)
            elif piece == "<ItemTitleList>":
                self.buffer += ", ".join(filter(None, (self.listed[place] for place in history))) or NO_HISTORY
            elif piece == "<TargetItemTitle>":
                self.buffer += self.target[item]
            else:
                self.buffer += piece
        self._flush()
        self.row_end.append(len(self.text))

    def _slot(self, role: int, place: int) -> None:
        for part in range(self.tokens_per_id):
            self.buffer += "." if part else ""
            self._flush()
            self._item(-1, role, place, part)
            self.is_first = False

    def _flush(self) -> None:
        if self.buffer:
            self._text((self.buffer, self.is_first))
            self.buffer = ""

    def _text(self, key: tuple[str, bool] | int) -> None:
        self._item(self.numbers.setdefault(key, len(self.numbers)), TEXT, 0, 0)
        self.is_first = False

    def _item(self, text: int, role: int, place: int, part: int) -> None:
        self.text.append(text)
        self.role.append(role)
        self.id.append(place)
        self.part.append(part)

    def finish(self, split: Split, group: I64) -> Prompts:
        text_offsets, tokens = self.encoder.encode(list(self.numbers))
        text = np.array(self.text, dtype=np.int64)
        slot = text < 0
        starts = np.where(slot, 0, text_offsets[:-1][text] if len(text_offsets) > 1 else 0)
        lengths = np.where(slot, 1, np.diff(text_offsets)[text] if len(text_offsets) > 1 else 1)
        item_offsets = offsets_of(lengths)
        bos, n = self.encoder.bos, len(split)
        row_start = item_offsets[np.array(self.row_end)]
        offsets = row_start + np.arange(n + 1) * len(bos)
        # Places of the items' tokens once every row has its beginning-of-sequence tokens before it.
        row_of_item = np.repeat(np.arange(n), np.diff(self.row_end))
        place = spans(item_offsets[:-1] + (row_of_item + 1) * len(bos), lengths)
        total = int(offsets[-1])
        token_ids = np.zeros(total, dtype=np.int32)
        for nth, token in enumerate(bos):
            token_ids[offsets[:-1] + nth] = token
        repeated = np.repeat(slot, lengths)
        token_ids[place[~repeated]] = tokens[spans(starts[~slot], lengths[~slot])]

        def at_slots(values: list[int], dtype: type) -> Array:
            out: Array = np.zeros(total, dtype=dtype)
            out[place[repeated]] = np.array(values, dtype=np.int64)[slot]
            return out

        return Prompts(
            offsets,
            token_ids,
            at_slots(self.role, np.uint8),
            at_slots(self.id, np.int32),
            at_slots(self.part, np.uint8),
            group,
            split.uid,
            split.iid,
            split.label,
            self.tokens_per_id,
        )


def cached_tokenize(
    folder: Path | str,
    split: Split,
    template: PromptTemplate,
    tokenizer: Any,
    titles: Sequence[str],
    *,
    history_length: int,
    tokens_per_id: int = 1,
) -> Prompts:
    """`tokenize`, or what an equal call left in `folder`: the file is named by a hash of all the tokens depend on.

    A file that cannot be read is replaced, with a warning.
    """
    key = {
        "format": _FORMAT,
        "template": template.variants,
        "tokenizer": Encoder(tokenizer).fingerprint,
        "split": split.fingerprint,
        "titles": hashlib.sha256(json.dumps(list(titles)).encode()).hexdigest(),
        "history_length": history_length,
        "tokens_per_id": tokens_per_id,
    }
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = Path(folder) / f"prompts-{name}.safetensors"
    if file.is_file():
        try:
            return Prompts.load(file)
        except ValueError as error:
            log.warning("%s; tokenising again", error)
    prompts = tokenize(split, template, tokenizer, titles, history_length=history_length, tokens_per_id=tokens_per_id)
    prompts.save(file)
    return prompts
