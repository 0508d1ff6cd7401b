"""The command blocks of the documentation, and what of them is not run here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from tests.ranks import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES = [
    REPOSITORY / "README.md",
    *sorted(
        page
        for page in (REPOSITORY / "docs").rglob("*.md")
        if "decisions" not in page.parts and page.name != "commands.md"
    ),
]


PROGRAMS = "gradwatch|pip|python|torchrun|make|ray|helm|kubectl|docker|step|curl|promtool|mkdocs"


class Elsewhere(NamedTuple):
    """A command that is not run by the test of the pages.

    Attributes:
        command: how it begins, as a pattern.
        by: the file that runs it, and what is to be found in there; None where nothing does.
        why: it is not run here.
    """

    command: str
    by: tuple[str, str] | None
    why: str


ELSEWHERE = [
    Elsewhere(r"make (demo|test|check)$", (".ci/run", "make {}"), "CI runs it"),
    Elsewhere(r"make venv$", ("Makefile", "venv: $(INSTALLED)"), "all of these begin with it"),
    Elsewhere(r"make (campaign|bench|campaign-rollbacks|ray-campaign|attribution)$", None, "takes long"),
    Elsewhere(r"make kills$", ("tests/e2e/test_loses_nothing.py", "KILLS"), "fewer of them"),
    Elsewhere(r"make screenshots$", ("tests/page/test_page.py", "site"), "the same pages, without pictures"),
    Elsewhere(r"python -m scripts\.", ("tests/docs/test_reference.py", "scripts.reference"), "with --check"),
    Elsewhere(
        r"pip install gradwatch$",
        ("tests/agent/test_autoload.py", "pip"),
        "the wheel that is built is installed",
    ),
    Elsewhere(
        r"(.venv/bin/)?gradwatch demo --fault (log-of-zero|recurring-nan)",
        ("tests/e2e/test_demo.py", "recurring-nan"),
        "takes a minute, and that test looks at what it says",
    ),
    Elsewhere(
        r"gradwatch checkpoints restore ID",
        ("tests/checkpoints/test_checkpoints_command.py", "restore"),
        "wants a quarantine",
    ),
    Elsewhere(r"gradwatch run .*train_ray\.py$", ("tests/e2e/test_ray.py", "train"), "wants a Ray cluster"),
    Elsewhere(
        r"helm install", ("tests/helm/test_release.py", '"install"'), "there, as far as without a cluster"
    ),
    Elsewhere(r"gradwatch collector --on-ray", ("tests/e2e/test_ray.py", "--on-ray"), "wants a Ray cluster"),
    Elsewhere(r"kubectl -n", None, "wants a cluster; what it makes is what the tests' pods are given"),
    Elsewhere(
        r"docker build", None, "wants a builder; the wheel that it installs is built and installed by a test"
    ),
    Elsewhere(
        r"step certificate create",
        ("tests/certificates.py", "def "),
        "wants step-ca; the tests make the same",
    ),
]


class Command(NamedTuple):
    """One command of a block, continued lines joined."""

    page: Path
    text: str


def commands(page: Path) -> Iterator[Command]:
    """All commands of a page's blocks, in their order, without comments."""
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE):
        joined = block.replace("\\\n", " ")
        # A loop is one command.
        for part in re.split(r"\n(?![^\n]*\bdone\b)(?!  )", joined):
            text = re.sub(r"\s+#.*$", "", part.strip(), flags=re.MULTILINE)
            if text:
                yield Command(page, text)


def hidden(page: Path) -> Iterator[str]:
    """Commands in blocks that are not said to be of a shell, where nobody would run them."""
    for kind, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE):
        if kind != "sh":
            yield from re.findall(rf"^ *\$? ?(?:{PROGRAMS}) .*", block, re.MULTILINE)


def elsewhere(command: Command) -> Elsewhere | None:
    """Why a command is not run here."""
    return next((one for one in ELSEWHERE if re.match(one.command, command.text)), None)
