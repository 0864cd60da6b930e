"""Ctrl-C and SIGTERM during training: finish what is under way, save, and leave. What is saved: `loop.py`."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; everything that was done is saved and `resume="auto"` continues it."""


class Stop:
    """Turns SIGINT and SIGTERM into `Interrupted`: at once, or at the next `check` inside `held`.

    A second signal while one is pending interrupts at once. Outside the main thread no handler can be installed and
    signals keep their usual meaning.
    """

    def __init__(self) -> None:
        self.requested = False
        self._held = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._held or self.requested:
            raise Interrupted("interrupted")
        self.requested = True
        logger.warning("%s: finishing this step, then saving", signal.Signals(number).name)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a signal only sets `requested`, which the loop looks at between steps."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.requested:
            raise Interrupted("interrupted")
