"""All match keys and actions: one table each, for the reader, its messages and the reference."""

from __future__ import annotations

from typing import NamedTuple

from gradwatch.collector.policy.model import Action


class Key(NamedTuple):
    """A key of `match`."""

    name: str
    takes: str
    meaning: str


COMPARISON = 'a whole number, or a comparison such as ">=3"'

MATCH_KEYS = (
    Key(
        "cause",
        "a cause, or a list of causes",
        "what made the job's gradients non-finite (`parameter` also matches an `update` that made weights "
        "bad)",
    ),
    Key(
        "phase",
        "a phase, or a list of phases",
        "where it began on the first rank (`parameter` also matches an `update` that made weights bad)",
    ),
    Key("value", "nan, +inf, -inf, or a list", "the first rank's first non-finite number"),
    Key("step", COMPARISON, "the incident's first bad step"),
    Key("rank", COMPARISON, "the first rank"),
    Key("node", "a name, a pattern such as gpu-1*, or a list", "the first rank's node"),
    Key("parameter", "a name, a pattern such as layers.*.weight, or a list", "the first bad parameter"),
    Key("origins", COMPARISON, "how many ranks were bad in the first round"),
    Key("count", COMPARISON, "the job's incidents so far, this one included; ignored ones do not count"),
    Key("same_rank", "true or false", "`count` only incidents with the same first rank; goes with `count`"),
    Key("within_steps", "a whole number from 1 on", "`count` only incidents so near; goes with `count`"),
    Key("consecutive_bad_steps", COMPARISON, "bad steps in a row up to now, across incidents"),
    Key("guard_exhausted", "true or false", "whether the guard has reached one of its limits"),
)

ACTIONS = {
    Action.IGNORE: "nothing; the incident is not counted by `count`",
    Action.WARN: "says so in log, report and metrics; the job goes on",
    Action.ROLLBACK: "goes back to the newest good checkpoint, if the budgets allow",
    Action.HALT: "stops the job with exit code 93",
}
