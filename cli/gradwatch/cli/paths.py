"""Where the state of this user lies, unless told otherwise."""

from __future__ import annotations

from pathlib import Path


def state_dir(given: Path | None) -> Path:
    """The state folder, absolute: `given`, else `~/.local/state/gradwatch`."""
    if given is not None:
        return given.expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_state_dir("gradwatch"))
