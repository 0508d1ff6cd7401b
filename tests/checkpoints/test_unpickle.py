"""The unpickler that builds plain data and runs nothing."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import pickle
import pickletools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.agent.checkpoints import unpickle as module
from gradwatch.agent.checkpoints.unpickle import unpickle
from gradwatch.agent.checkpoints.values import Inline, Stub, UnreadableError

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.text(), st.integers()), inner)
    ),
)


@settings(max_examples=150, deadline=None)
@given(plain, st.integers(0, 5))
def test_plain_data_reads_as_pickle_reads_it(value, protocol):
    assert unpickle(pickle.dumps(value, protocol)) == value


@settings(max_examples=300, deadline=None)
@given(plain, st.integers(0, 5), st.data())
def test_a_damaged_pickle_gives_a_value_or_an_error_and_nothing_else(value, protocol, data):
    damaged = bytearray(pickle.dumps(value, protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnreadableError):
        unpickle(bytes(damaged))


def reduce_to(function, *arguments) -> bytes:
    class Evil:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps(Evil())


@pytest.mark.parametrize(
    "make",
    [
        lambda mark: reduce_to(os.system, f"touch {mark}"),
        lambda mark: reduce_to(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: reduce_to(open, str(mark), "w"),
        # the oldest opcodes call, too
        lambda mark: b"(S'touch %b'\nios\nsystem\n." % str(mark).encode(),
        lambda mark: b"c__builtin__\nopen\n(S'%b'\nS'w'\ntR." % str(mark).encode(),
        # a rebuilder with another function inside
        lambda mark: (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n(S'touch %b'\ntNtR."
            % str(mark).encode()
        ),
    ],
)
def test_what_a_pickle_wants_to_call_is_not_called(tmp_path, make):
    mark = tmp_path / "executed"
    value = unpickle(make(mark))
    assert isinstance(value, Stub)
    assert not mark.exists()


def test_a_build_reaches_no_object_of_ours():
    # sets __class__, __dict__ and methods on what it made
    code = b"(ios\nsystem\n}(S'__class__'\nI1\nS'attributes'\nI2\nub."
    value = unpickle(code)
    assert type(value) is Stub
    assert value.attributes() == {"__class__": 1, "attributes": 2}


def nested_tuples(depth: int) -> bytes:
    return b")" + b"\x85" * depth


HOSTILE = {
    # an index that would make a memo of 16 GB
    "huge memo index": (b"Nr" + struct.pack("<I", 2**31) + b".", None),
    "half of a billion of memo indices": (b"N" + b"r\xff\xff\xff\x7f" + b"h\x07.", "damaged"),
    # a length that is not there
    "string of 2^62 bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "damaged"),
    "negative length": (b"T\xff\xff\xff\xffx.", "damaged"),
    # hashing this would overflow the stack
    "deep key": (b"}" + nested_tuples(200_000) + b"Ns.", "nested too deeply"),
    # hashing this would take 2^60 steps
    "wide key": (b"}" + b"N\x85" + b"2\x86" * 60 + b"Ns.", "nested too deeply"),
    "deep value": (nested_tuples(200_000) + b".", None),
    "deep lists": (b"]" * 100_000 + b"a" * 99_999 + b".", None),
    "a list in itself": (b"]q\x00h\x00a.", None),
    "unhashable key": (b"}]Ns.", "damaged"),
    "empty stack": (b"R.", "damaged"),
    "no end": (b"NNN", "damaged"),
    "number of a million digits": (b"I" + b"9" * 1_000_000 + b"\n.", "damaged"),
    "persistent id": (b"Nq\x00Q.", "lies outside"),
    "extension code": (b"\x82\x01.", "damaged"),
    "buffer out of band": (b"\x97.", "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_read_in_bounds_or_refused(name):
    code, message = HOSTILE[name]
    if message is None:
        unpickle(code)
    else:
        with pytest.raises(UnreadableError, match=message):
            unpickle(code)


def test_sizes_are_capped(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(UnreadableError, match="100 are read at most"):
        unpickle(pickle.dumps(b"x" * 101))
    with pytest.raises(UnreadableError, match="100 are read at most"):
        module.unpickle_from(module.Clamped(io.BytesIO(pickle.dumps("x" * 10_000, 3))))


def test_operations_are_capped(monkeypatch):
    monkeypatch.setattr(module, "MAX_OPERATIONS", 100)
    with pytest.raises(UnreadableError, match="100 operations"):
        unpickle(pickle.dumps(list(range(200))))


def test_containers_and_numbers_of_the_standard_library_and_numpy():
    value = unpickle(
        pickle.dumps(
            {
                "ordered": collections.OrderedDict(a=1),
                "default": collections.defaultdict(list, b=[2]),
                "count": np.int64(-7),
                "array": np.array([1.0, float("nan")], dtype="f4"),
                "scalar": np.float64(2.5),
                "namespace": argparse.Namespace(lr=3),
            },
            protocol=2,
        )
    )
    assert (value["ordered"], value["default"], value["count"]) == ({"a": 1}, {"b": [2]}, -7)
    assert isinstance(value["array"], Inline)
    assert (value["array"].dtype, len(value["array"].data)) == ("float32", 8)
    assert (value["scalar"].dtype, value["scalar"].data) == ("float64", struct.pack("<d", 2.5))
    assert value["namespace"].attributes() == {"lr": 3}


def test_every_opcode_of_the_format_is_known():
    known = module._Machine(None)._operations()
    unknown = {opcode.name for opcode in pickletools.opcodes} - known.keys()
    # codes of a registry of the process, and buffers outside of the pickle: no checkpoint has them
    assert unknown == {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER"}
