"""Write the dashboards' JSON into the chart; with --check only say whether it is up to date.

usage: python -m scripts.dashboards [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from scripts.dashboards.fleet import fleet
from scripts.dashboards.incident import incident
from scripts.dashboards.job import job

FOLDER = Path(__file__).parents[2] / "helm" / "gradwatch" / "dashboards"
DASHBOARDS = {"fleet": fleet, "job": job, "incident": incident}


def main(*, check: bool) -> int:
    """Write them, or compare."""
    stale = []
    for name, make in DASHBOARDS.items():
        text = JSONEncoder(sort_keys=True, indent=2).encode(make().build()) + "\n"
        file = FOLDER / f"{name}.json"
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        elif not file.exists() or file.read_text() != text:
            stale.append(file.name)
    if stale:
        print(f"not up to date: {', '.join(stale)}; run python -m scripts.dashboards", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv))
