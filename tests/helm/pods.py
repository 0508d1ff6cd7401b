"""Pods without Kubernetes: an image with torch alone, what the init container brings, and a sidecar."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from typing import TYPE_CHECKING

from tests.ranks import REPOSITORY
from tests.torch_alone import link_torch

if TYPE_CHECKING:
    from pathlib import Path


def make_image(folder: Path) -> Path:
    """A Python with torch and none of our dependencies; returns its bin folder."""
    venv.create(folder, symlinks=True, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    link_torch(packages)
    return folder / "bin"


def bring(folder: Path) -> Path:
    """What the init container brings, from a wheel of this checkout; returns its `gradwatch`."""
    wheels = folder / "wheels"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    brought = folder / "training"
    subprocess.run(
        [REPOSITORY / "docker" / "training.sh", brought, wheel],
        check=True,
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
    )
    return brought / "bin" / "gradwatch"


class Pod:
    """One Pod of a job: a sidecar, and a container that runs `gradwatch run --no-sidecar`.

    Args:
        folder: the volume that they share; made.
        image: the bin folder of the training image.
        brought: the `gradwatch` that the init container has brought.
        node: of the cluster.
    """

    def __init__(self, folder: Path, image: Path, brought: Path, node: str) -> None:
        folder.mkdir()
        self.folder = folder
        self._image, self._brought, self._node = image, brought, node
        self._sidecar: subprocess.Popen[bytes] | None = None

    def start_sidecar(self, *arguments: object) -> None:
        """From an environment of its own: the image of the collector."""
        command = [sys.executable, "-m", "gradwatch.cli", "sidecar", "--state-dir", self.folder / "state"]
        with (self.folder / "sidecar.log").open("wb") as log:
            self._sidecar = subprocess.Popen(
                [*map(str, [*command, *arguments])], env=self._environment(), stderr=log, cwd=self.folder
            )

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """The container: its command to the end."""
        command = [self._brought, "run", "--no-sidecar", "--state-dir", self.folder / "state", *arguments]
        path = f"{self._image}{os.pathsep}{os.environ['PATH']}"
        # The image has a PYTHONPATH of its own, which stays.
        env = self._environment() | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*map(str, command)],
            env=env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    def kill_sidecar(self) -> None:
        """As the kernel does when memory runs out."""
        assert self._sidecar is not None
        self._sidecar.kill()
        self._sidecar.wait()

    def end(self) -> int:
        """The kubelet ends the sidecar; its exit code."""
        if self._sidecar is None:
            return 0
        self._sidecar.terminate()
        return self._sidecar.wait(60)

    def _environment(self) -> dict[str, str]:
        bare = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        return bare | {"GRADWATCH_NODE": self._node}
