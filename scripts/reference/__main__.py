"""Write what the docs have from the code; with --check only say whether it is up to date.

usage: python -m scripts.reference [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.reference import commands, metrics, policy

DOCS = Path(__file__).parents[2] / "docs"


def main(*, check: bool) -> int:
    """Write them, or compare."""
    pages = {
        "metrics.md": metrics.page(),
        "commands.md": commands.page(),
        "policy.md": policy.page((DOCS / "policy.md").read_text()),
    }
    stale = [name for name, text in pages.items() if not _is(name, text)]
    if check:
        if stale:
            print(f"not up to date: {', '.join(stale)}; run python -m scripts.reference", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(pages[name])
        print(f"written: docs/{name}")
    return 0


def _is(name: str, text: str) -> bool:
    file = DOCS / name
    return file.exists() and file.read_text() == text


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv))
