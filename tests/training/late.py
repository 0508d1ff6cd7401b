"""A device that is behind: its events pass three questions late."""

from __future__ import annotations

import os


class LateEvent:
    """Stands for `torch.cuda.Event`."""

    asked = 0

    def record(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 3

    def synchronize(self) -> None:
        self.asked = 4


def late_device_look() -> None:
    """Have the probe, if there is one, look at this CPU as at such a device."""
    if os.environ.get("GRADWATCH_SPOOL"):
        from gradwatch.agent.probe.model import WatchedModel

        WatchedModel._choose_look = lambda self, device, parameters: self._device_look(
            device, parameters, LateEvent
        )
