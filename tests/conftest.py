"""In which order the tests run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones begin first, so that no worker is alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
