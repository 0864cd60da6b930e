"""Bulk tokenisation of text segments exactly as they would be inside the whole prompt; titles stay plain text. F2."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_fast.data.ragged import I64, offsets_of
from collm_fast.data.templates import TAGS

# Stands before every segment that follows a slot. It is an added token of our own copy of the tokenizer, made of
# private-use characters, so that the text after it is seen as text after a special token, not as a text's beginning.
_MARK = "\U000f5c01\U000f5c02collm_fast\U000f5c02\U000f5c01"
_CHUNK = 8192


class Encoder:
    """A tokenizer with special tokens switched off for text, and its beginning-of-sequence tokens.

    Fields: bos: the token ids the tokenizer puts before a text by itself; fingerprint: sha256 of the vocabulary and
    everything else that decides the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos = _bos(tokenizer)
        self._special: dict[str, int] = {
            token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens
        }
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
        self._marked: Any = None

    @property
    def fingerprint(self) -> str:
        if self._is_fast():
            described = self._backend.to_str()
        else:
            described = f"{type(self._tokenizer).__name__}:{sorted(self._tokenizer.get_vocab().items())}"
        return hashlib.sha256(f"{described}:{self.bos}:{sorted(self._special.items())}".encode()).hexdigest()

    def split_special(self, pieces: Sequence[str]) -> list[str | int]:
        """A template's pieces with the special tokens that its text spells out replaced by their ids."""
        if not self._special:
            return list(pieces)
        longest_first = sorted(self._special, key=len, reverse=True)
        pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        out: list[str | int] = []
        for piece in pieces:
            parts = [piece] if piece in TAGS else pattern.split(piece)
            for part in parts:
                if part:
                    out.append(self._special.get(part, part))
        return out

    def encode(self, keys: Sequence[tuple[str, bool] | int]) -> tuple[I64, NDArray[np.int32]]:
        """(offsets, token ids) of the keys, in order: a token id itself, or (text, whether it begins the prompt)."""
        out: list[list[int]] = [[key] if isinstance(key, int) else [] for key in keys]
        for first in (True, False):
            places = [nth for nth, key in enumerate(keys) if not isinstance(key, int) and key[1] is first]
            for start in range(0, len(places), _CHUNK):
                chunk = places[start : start + _CHUNK]
                texts = [keys[nth][0] for nth in chunk]  # type: ignore[index]
                for nth, ids in zip(chunk, self._encode(texts, first), strict=True):
                    out[nth] = ids
        offsets = offsets_of(np.array([len(ids) for ids in out], dtype=np.int64))
        return offsets, np.fromiter((token for ids in out for token in ids), dtype=np.int32, count=int(offsets[-1]))

    def _encode(self, texts: list[str], first: bool) -> list[list[int]]:
        if not self._is_fast():
            encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
            return [list(ids) for ids in encoded["input_ids"]]
        marked = self._marked_copy()
        if first:
            return [encoding.ids for encoding in marked.encode_batch_fast(texts, add_special_tokens=False)]
        encodings = marked.encode_batch_fast([_MARK + text for text in texts], add_special_tokens=False)
        return [encoding.ids[1:] for encoding in encodings]

    def _is_fast(self) -> bool:
        return self._backend is not None and hasattr(self._backend, "to_str")

    def _marked_copy(self) -> Any:
        if self._marked is None:
            from tokenizers import AddedToken, Tokenizer

            copy = Tokenizer.from_str(self._backend.to_str())
            copy.encode_special_tokens = True
            copy.no_truncation()
            copy.no_padding()
            copy.add_tokens([AddedToken(_MARK, normalized=False, special=False)])
            self._marked = copy
        return self._marked


def _bos(tokenizer: Any) -> list[int]:
    """The ids a tokenizer adds before a text by itself; what it adds behind one would follow the answer marker."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return [int(token) for token in full[:start]]
    return []
