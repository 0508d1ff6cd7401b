"""A collector with real jobs in it, and a headless Chromium that looks at it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from gradwatch.cli.demo import broken, faults, shards, train
from gradwatch.cli.launcher import collector_state
from tests.ranks import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

DRY_RUN = """
apiVersion: gradwatch/v1
mode: dry_run
rules:
  - name: any
    match: {}
    action: rollback
checkpoints:
  root: {root}
"""


def until(look: Callable[[], Any], *, seconds: float = 200) -> Any:
    """Ask until the answer is true; the deadline is for a broken test only."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} seconds")


@dataclass
class Site:
    """A collector, and where its jobs keep what is theirs.

    Attributes:
        url: of its page.
    """

    folder: Path
    url: str
    _stops: list[tuple[Path, subprocess.Popen[bytes]]] = field(default_factory=list)

    def train(self, job: str, command: Sequence[object], *, policy: str | None = None) -> None:
        """Run a job to its end."""
        done = subprocess.run(
            self._run(job, command, policy),
            env=_environment(),
            cwd=REPOSITORY,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()

    def break_operator(self, job: str, step: int) -> None:
        """A GPT of two ranks, in which rank 1 takes the logarithm of zero in one step; it ends."""
        data = self.folder / f"{job}-data"
        data.mkdir()
        shards.write(data, faults.plant(1, faults.Fault.LOG_OF_ZERO), 1)
        script = [broken.__file__, data, "--fault", "log-of-zero", "--step", step, "--ranks", 1]
        self.train(job, [*_torchrun(2), *script], policy=DRY_RUN)

    def heal(self, job: str, seed: int) -> None:
        """The demo's GPT of four ranks, which is rolled back over a stretch of bad data; it ends."""
        data = self.folder / f"{job}-data"
        data.mkdir()
        shards.write(data, faults.plant(seed, faults.Fault.RECURRING_NAN), seed)
        policy = (REPOSITORY / "examples/demo-policy.yaml").read_text().replace("/tmp/checkpoints", "{root}")
        script = [train.__file__, data, "--checkpoints", self._checkpoints(job), "--resume", "{resume}"]
        self.train(job, [*_torchrun(4), *script], policy=policy)

    def go_on(self, job: str, bad_step: int, *, ranks: int = 2) -> None:
        """A job that trains until the site is left; rank 1 goes bad at a step, and stays bad."""
        stop = self.folder / f"{job}-stop"
        module = ["-m", "tests.training.until_told", stop, 1, bad_step, self._checkpoints(job)]
        running = subprocess.Popen(
            self._run(job, [*_torchrun(ranks), *module], DRY_RUN),
            env=_environment(),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stops.append((stop, running))

    def stop(self) -> None:
        """End the jobs that go on."""
        for stop, running in self._stops:
            stop.touch()
            running.wait(120)

    def ask(self, path: str) -> Any:
        """What the API says."""
        return httpx.get(self.url + path, trust_env=False).json()

    def _checkpoints(self, job: str) -> Path:
        folder = self.folder / f"{job}-checkpoints"
        folder.mkdir(exist_ok=True)
        return folder

    def _run(self, job: str, command: Sequence[object], policy: str | None) -> list[str]:
        flags: list[object] = ["--job", job, "--state-dir", self.folder / "state"]
        if policy is not None:
            file = self.folder / f"{job}-policy.yaml"
            file.write_text(policy.replace("{root}", str(self._checkpoints(job))))
            flags += ["--policy", file]
        whole = [sys.executable, "-m", "gradwatch.cli", "run", *flags, "--", *command]
        return [str(part) for part in whole]


@contextlib.contextmanager
def site(folder: Path, *flags: str) -> Iterator[Site]:
    """A collector that stands.

    Args:
        folder: for all that it and its jobs keep.
        flags: of `gradwatch collector`.
    """
    state = folder / "state"
    command = [sys.executable, "-m", "gradwatch.cli", "collector", "--state-dir", str(state)]
    addresses = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    collector = subprocess.Popen(
        [*command, *addresses, *flags],
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    it = None
    try:
        info = until(lambda: collector_state.ready(state))
        it = Site(folder, info.http)
        yield it
    finally:
        if it is not None:
            it.stop()
        collector.terminate()
        collector.wait(60)


@contextlib.contextmanager
def chromium(
    *, width: int = 1200, height: int = 900, dark: bool = False, phone: bool = False
) -> Iterator[Any]:
    """Debian's, without a screen.

    Args:
        width: of its window, in pixels.
        height: likewise.
        dark: as somebody who prefers dark sees it.
        phone: as on a telephone, 390 pixels wide.
    """
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert program, "this wants Debian's package chromium"
    assert driver, "this wants Debian's package chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        scheme = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        if phone:
            size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield browser
    finally:
        browser.quit()


def _torchrun(ranks: int) -> list[object]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]


def _environment() -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
