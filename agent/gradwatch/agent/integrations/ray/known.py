"""Which Rays are known from the inside. Pure.

To watch, public hooks are enough. To restart the workers, and to choose what they resume from, parts of Ray
Train are used that it does not promise to keep: with a Ray that nobody has tried, a rollback is refused.
"""

from __future__ import annotations

OLDEST = (2, 49)
NEWEST = (2, 60)


def why_unknown(version: str) -> str | None:
    """Why nothing is rolled back under this Ray; None when it is known.

    Args:
        version: of Ray, such as "2.60.0".
    """
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        major, minor = 0, 0
    if OLDEST <= (major, minor) <= NEWEST:
        return None
    return (
        f"Ray {version} is not one that Gradwatch knows ({_text(OLDEST)} to {_text(NEWEST)}): it can be "
        "watched, and not rolled back, unless the train function asks gradwatch's good_checkpoint() what to "
        "resume from, and the callback is told so: WatchCallback(asks_for_checkpoint=True)"
    )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
