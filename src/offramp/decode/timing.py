"""Where decoding time goes: seconds spent in each named part."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Timed = Callable[[str], AbstractContextManager[None]]  # part → a context whose time counts as that part's


class Timer:
    """Adds up seconds by part. Set it as an engine's `timed`; without a timer the engine measures nothing."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def add(self, part: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere as those of `part`."""
        self.seconds[part] += seconds

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time while the context is open as that of `part`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started


_NOTHING = nullcontext()


def untimed(part: str) -> AbstractContextManager[None]:
    """Measures nothing, and costs nothing."""
    return _NOTHING
