"""What the phases of a step take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Clock:
    """
    Seconds of the phases of a step on this rank, accelerators waited for.

    Args:
        device (`torch.device`): Where the phases compute.
        begin_phase (`Callable`): Is told the name of each phase when it begins.

    Attributes:
        seconds (`dict[str, float]`): Of each phase since the last `start`, in the order in which they began.
    """

    def __init__(self, device: torch.device, begin_phase: Callable[[str], None]):
        self._device, self._begin_phase = device, begin_phase
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        """Forget the step before."""
        self.seconds = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase, as long as the context lasts, that the step goes into."""
        self._begin_phase(name.replace("_", " "))
        with self.timing(name):
            yield

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """The seconds of the context, added to those of the same name in this step."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
