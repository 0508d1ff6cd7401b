"""What decides does no IO and reads no clock."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from gradwatch.collector import policy

FOLDER = Path(policy.__file__).parent
ALLOWED = {
    "__future__",
    "collections",
    "dataclasses",
    "datetime",
    "difflib",
    "enum",
    "fnmatch",
    "hashlib",
    "itertools",
    "json",
    "operator",
    "pydantic",
    "re",
    "textwrap",
    "typing",
    "yaml",
}
OURS = {"recovery", "model", "observations", "errors", "evidence", "fold", "schema", "policy"}


def imported(module: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_module_imports_only_what_is_pure(module: Path):
    for name in imported(module):
        if name.startswith("gradwatch."):
            assert name.split(".")[2] in OURS, name
        else:
            assert name.split(".")[0] in ALLOWED, name


@pytest.mark.parametrize("module", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_module_opens_nothing_and_asks_no_clock(module: Path):
    called = {
        node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call)
    }
    assert not called & {"open", "now", "utcnow", "today", "print", "input", "exec", "eval"}


def test_yaml_is_known_in_one_module():
    assert [path.stem for path in FOLDER.glob("*.py") if "yaml" in imported(path)] == ["text"]
