"""Someone asks a run to stop, and it does so at the next whole step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopRequest:
    """Which signal asked the run to stop; 0 for none."""

    signal: int = 0


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """While inside, Ctrl-C and SIGTERM ask for a stop at the next whole step; a second one stops at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: Any) -> None:
        if request.signal:
            raise KeyboardInterrupt
        request.signal = number
        say("Stopping after this step, to save it. Once more stops at once and loses the steps since the last checkpoint.")

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
