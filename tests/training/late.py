"""A device that is behind: its events pass some questions late."""

from __future__ import annotations

import os


class LateEvent:
    """Stands for `torch.cuda.Event`."""

    behind = 3
    asked = 0

    def record(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > self.behind

    def synchronize(self) -> None:
        self.asked = self.behind + 1


def late_device_look(behind: int = 3) -> None:
    """Have the probe, if there is one, look at this CPU as at such a device, so many questions behind."""
    LateEvent.behind = behind
    if os.environ.get("GRADWATCH_SPOOL"):
        from gradwatch.agent.probe.model import WatchedModel

        WatchedModel._choose_look = lambda self, device, parameters: self._device_look(
            device, parameters, LateEvent
        )
