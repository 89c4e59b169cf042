"""Ctrl-C between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupts:
    """Notes a first Ctrl-C inside a `with`, so that the step ends; a second one acts at once."""

    def __init__(self, *, deferred: bool) -> None:
        self.asked = False
        self._deferred = deferred

    def __enter__(self) -> Interrupts:
        here = threading.current_thread() is threading.main_thread()
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._deferred = self._deferred and here and usual
        if self._deferred:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._deferred:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
