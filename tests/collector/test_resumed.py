"""Whether a job has gone back to what it was told to, as its ranks say."""

from __future__ import annotations

import itertools

import pytest
from pydantic import TypeAdapter

from gradwatch.collector import document, tables
from gradwatch.collector import observations as obs
from gradwatch.collector.model import JobState
from tests.collector.history import Told, batch, hello, progress

PATH = "/ckpt/step_30.pt"
NO, YES = obs.Resumed(PATH, opened=False), obs.Resumed(PATH, opened=True)

# What each of two ranks says, and what follows.
SAID = [
    ({0: NO, 1: NO}, False),
    ({0: YES, 1: NO}, True),
    ({0: NO, 1: YES}, True),
    ({0: YES}, True),
    # The other may have opened it for both.
    ({0: NO}, None),
]


@pytest.mark.parametrize(("said", "honoured"), SAID)
def test_what_the_ranks_say_of_a_checkpoint(said, honoured):
    for order in itertools.permutations(said):
        told = Told().hellos(2, generation=1)
        for rank in order:
            told.tell(batch(f"r{rank}", 1, said[rank]))
        known = document.job(told.state, "j")
        assert (known.resume.path, known.resume.generation, known.resume.honoured) == (PATH, 1, honoured)
        loud = f"the job was told to resume from {PATH} and has not opened it: it started from scratch"
        assert (loud in known.warnings) == (honoured is False)


def test_a_rank_that_says_nothing_until_the_end_has_not_opened_it():
    told = Told().hellos(2, generation=1).tell(batch("r0", 1, NO))
    for rank in range(2):
        told.tell(progress(f"r{rank}", 5, 2 - rank, ended=True))
    assert document.job(told.state, "j").resume.honoured is False


def test_a_job_that_was_told_nothing():
    told = Told().hellos(2)
    assert document.job(told.state, "j").resume is None
    assert document.job(told.state, "j").warnings == []


def test_the_newest_generation_counts():
    told = Told().tell(batch("r0", 0, hello(0, 1, generation=1, attempt_key="a"), NO))
    told.tell(batch("s0", 0, hello(0, 1, generation=2, attempt_key="b"), YES))
    known = document.job(told.state, "j")
    assert (known.resume.generation, known.resume.honoured, known.warnings) == (2, True, [])


def test_generations_are_remembered_in_little_space_and_read_back():
    told = Told()
    for generation in range(1, 20):
        key = f"k{generation}"
        told.tell(batch(key, 0, hello(0, 1, generation=generation, attempt_key=key), NO))
    assert [one.generation for one in told.job.resumes] == [16, 17, 18, 19]
    assert TypeAdapter(JobState).validate_json(tables.job_row(told.job)["state"]) == told.job


def test_a_job_of_before_is_read_back():
    told = Told().hellos(1)
    codec = TypeAdapter(JobState)
    stored = codec.dump_python(told.job, mode="json")
    for name in ("resumes", "bad_losses"):
        del stored[name]
    assert codec.validate_python(stored) == told.job
