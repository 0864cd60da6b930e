"""A fitted collaborative model: its tables, its biases and its file, whatever it was fitted by.

Fitting is training/cf.py; models/collm.py reads the tables. Floor F2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from collm_fast.config import CFConfig, from_mapping, to_mapping
from collm_fast.io.atomic import write_atomic

FILE = "cf.safetensors"
FORMAT = 2
# Pairs scored at once: two gathered blocks of 16 MB at 256 dimensions.
_CHUNK = 16384


@dataclass(frozen=True, eq=False)
class CFModel:
    """What is left of a collaborative model once fitted; id 0 is padding.

        score(u, i) = <user_u, item_i> + user_bias_u + item_bias_i + offset

    Fields: name ("mf", "lightgcn"); config, without None; user [U, D] and item [I, D] float32; user_bias [U] and
    item_bias [I] float32 or None; offset; fingerprint of the dataset it was fitted to ("" where unknown).
    """

    name: str
    config: CFConfig
    user: Tensor
    item: Tensor
    user_bias: Tensor | None = None
    item_bias: Tensor | None = None
    offset: float = 0.0
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.user.dim() != 2 or self.item.dim() != 2 or self.user.shape[1] != self.item.shape[1]:
            shapes = f"{list(self.user.shape)} and {list(self.item.shape)}"
            raise ValueError(f"CFModel: expected user [U, D] and item [I, D], got {shapes}")
        for what, bias, table in (("user", self.user_bias, self.user), ("item", self.item_bias, self.item)):
            if bias is not None and bias.shape != table.shape[:1]:
                raise ValueError(f"CFModel: expected {what}_bias [{len(table)}], got {list(bias.shape)}")
        for what, tensor in self._tensors().items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"CFModel: expected {what} in float32, got {tensor.dtype}")

    @property
    def dim(self) -> int:
        """D, the width of both tables."""
        return int(self.user.shape[1])

    @property
    def calibrated(self) -> bool:
        """Whether sigmoid(score) is a probability: a model fitted with bpr only ranks a user's items."""
        return self.config.loss == "bce"

    @torch.no_grad()
    def score(self, uid: ArrayLike, iid: ArrayLike) -> NDArray[np.float32]:
        """Logits [n] float32 of pairs of our ids [n].

        Raises: ValueError for unequal lengths or an id out of its table.
        """
        users, items = _ids("uid", uid, len(self.user)), _ids("iid", iid, len(self.item))
        if users.shape != items.shape:
            raise ValueError(f"CFModel.score: expected uid and iid of equal length, got {len(users)} and {len(items)}")
        out = torch.empty(len(users))
        for begin in range(0, len(users), _CHUNK):
            u, i = users[begin : begin + _CHUNK], items[begin : begin + _CHUNK]
            logit = (self.user[u] * self.item[i]).sum(-1) + self.offset
            logit += 0.0 if self.user_bias is None else self.user_bias[u]
            logit += 0.0 if self.item_bias is None else self.item_bias[i]
            out[begin : begin + _CHUNK] = logit
        return np.asarray(out.numpy())

    def save(self, folder: Path | str) -> Path:
        """Write folder/cf.safetensors, atomically; returns its path."""
        from safetensors.torch import save_file

        header = {
            "format": FORMAT,
            "name": self.name,
            "config": to_mapping(self.config),
            "offset": self.offset,
            "fingerprint": self.fingerprint,
        }
        # One key: safetensors writes several in an order of chance, and equal models should be equal files.
        metadata = {"collm_fast": json.dumps(header, sort_keys=True)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        return write_atomic(Path(folder) / FILE, lambda path: save_file(tensors, path, metadata=metadata))

    @classmethod
    def load(cls, path: Path | str) -> CFModel:
        """Read what `save` wrote, from its folder or the file itself.

        Raises: ValueError naming the file where there is none, or none of this kind.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"CFModel.load: expected {FILE} or a folder with it, got {path}")
        try:
            with safe_open(str(file), framework="pt") as stored:
                header = json.loads((stored.metadata() or {}).get("collm_fast", "{}"))
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"CFModel.load: expected a safetensors file, got {file}: {error}") from error
        keys = {"format", "name", "config", "offset", "fingerprint"}
        if header.get("format") != FORMAT or not keys <= header.keys() or not {"user", "item"} <= tensors.keys():
            raise ValueError(f"CFModel.load: expected a collaborative model of format {FORMAT}, got {file}")
        return cls(
            name=header["name"],
            config=from_mapping(CFConfig, header["config"], f"{file}: "),
            user=tensors["user"],
            item=tensors["item"],
            user_bias=tensors.get("user_bias"),
            item_bias=tensors.get("item_bias"),
            offset=header["offset"],
            fingerprint=header["fingerprint"],
        )

    def _tensors(self) -> dict[str, Tensor]:
        named = {"user": self.user, "item": self.item, "user_bias": self.user_bias, "item_bias": self.item_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def _ids(name: str, values: ArrayLike, size: int) -> Tensor:
    ids = np.asarray(values)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"CFModel.score: expected {name} [n] of integers, got {list(ids.shape)} {ids.dtype}")
    ids = ids.astype(np.int64)
    bad = np.flatnonzero((ids < 0) | (ids >= size))
    if bad.size:
        raise ValueError(f"CFModel.score: expected {name} in [0, {size}), got {ids[bad[0]]} at row {bad[0]}")
    return torch.from_numpy(ids)
