"""The documentation is built as a site, and no link in it leads nowhere."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.ranks import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path


def test_the_site_is_built_without_a_warning(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "runbooks" / "incident" / "index.html").exists()


def test_the_readmes_links_and_pictures_are_there():
    text = (REPOSITORY / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (REPOSITORY / target).exists(), target
