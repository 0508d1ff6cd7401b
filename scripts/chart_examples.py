"""Make examples/kubernetes/ from the chart helm/examples; with --check say whether it is up to date.

usage: python -m scripts.chart_examples [--check]
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.chart_tools import helm

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "examples" / "kubernetes"
_HEAD = "# Made by scripts/chart_examples.py from helm/examples, where the same is a template.\n"
_SOURCE = re.compile(r"^---\n# Source: gradwatch-examples/templates/(.+)\n", re.MULTILINE)


def main() -> int:
    """Write the files, or compare them."""
    made = {name: _HEAD + text for name, text in rendered(4).items()}
    if "--check" in sys.argv[1:]:
        kept = {path.name: path.read_text() for path in FOLDER.glob("*.yaml")}
        if kept == made:
            return 0
        old = sorted(name for name in kept.keys() | made.keys() if kept.get(name) != made.get(name))
        print(f"{FOLDER}: old: {', '.join(old)}; run: python -m scripts.chart_examples", file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.yaml"):
        path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text)
    return 0


def rendered(major: int) -> dict[str, str]:
    """What helm/examples gives, by template."""
    with tempfile.TemporaryDirectory() as folder:
        charts = shutil.copytree(REPOSITORY / "helm", Path(folder) / "helm")
        examples = charts / "examples"
        run = [helm(major), "dependency", "update", examples]
        subprocess.run(run, check=True, capture_output=True)
        done = subprocess.run(
            [helm(major), "template", "example", examples], check=True, capture_output=True, text=True
        )
    _, *parts = _SOURCE.split(done.stdout)
    found: dict[str, str] = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        joined = f"{found[name]}---\n" if name in found else ""
        found[name] = f"{joined}{text.strip()}\n"
    return found


if __name__ == "__main__":
    sys.exit(main())
