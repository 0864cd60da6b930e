"""Atomic writes: a reader sees the old file or the whole new one, never a part. What is written lives elsewhere."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], object]) -> Path:
    """Write a file under a temporary name in its own folder, sync it and rename it into place.

    Args:
        path: the file; its folder is created when missing.
        content: the bytes, a text (UTF-8), or a function that writes a complete file at the path it is given.
    Returns: the path.
    Raises: whatever the function raises; then nothing of the new content is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as np.save or matplotlib choose the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        _set_usual_mode(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return path


def _set_usual_mode(path: Path) -> None:
    # mkstemp makes files private; a run folder is meant to be read by whoever may read its neighbours.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder is synced; not every system lets a folder be opened.
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
