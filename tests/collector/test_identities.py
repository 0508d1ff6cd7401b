"""Whom the collector knows, and what that allows: the deciding parts, by tables."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest

from gradwatch.collector import observations as obs
from gradwatch.collector.access import names
from gradwatch.collector.access.admission import Known, Refused, admit, digest
from gradwatch.collector.access.config import Access
from gradwatch.collector.access.identities_file import read_identities
from gradwatch.collector.access.identity import ANYBODY, Identity, Role
from gradwatch.collector.access.reports import why_not_taken
from gradwatch.collector.errors import AccessError
from tests.collector.history import (
    Told,
    batch,
    hello,
    launch_ended,
    launch_started,
    nonfinite,
    progress,
    report,
)

TOKEN, OTHER = "gw_a-token-of-the-tests", "gw_another-token-of-the-tests"
HASH = digest(TOKEN).hex()
ALICE = Identity("alice", Role.VIEWER, ("llm-*",))
NODE = Identity("node", Role.AGENT, ("j", "llm-*"))


# ---------------------------------------------------------------- the file


def test_a_file_names_everybody():
    text = f"""
identities:
  - name: alice
    role: viewer
    jobs: llm-*
    token_sha256: {HASH}
  - {{name: node, role: agent, jobs: [j, "llm-*"], certificate: node0.example}}
  - {{name: ops, role: operator, certificate: "spiffe://cluster/ops"}}
"""
    by_digest, by_certificate = read_identities(text.encode(), "ids.yaml")
    assert by_digest == {digest(TOKEN): ALICE}
    assert by_certificate == {
        "node0.example": NODE,
        "spiffe://cluster/ops": Identity("ops", Role.OPERATOR, ("*",)),
    }


def test_a_file_may_be_json_and_may_name_nobody():
    entry = {"name": "alice", "role": "viewer", "jobs": ["llm-*"], "token_sha256": HASH}
    assert read_identities(json.dumps({"identities": [entry]}, indent=2).encode(), "f") == (
        {digest(TOKEN): ALICE},
        {},
    )
    assert read_identities(b"identities: []", "f") == ({}, {})


GOOD = f"name: a, role: viewer, token_sha256: {HASH}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "f:1: the file is empty"),
        ("identities:", "f:1: identities: must be a list"),
        ("people: []", "f:1: identities: is missing"),
        (f"identities: [{{{GOOD}}}]\nmore: 1", "f:2: more: unknown key; allowed are identities"),
        (f"identities:\n- {{{GOOD}, job: x}}", "f:2: identities[0].job: unknown key (did you mean 'jobs'?)"),
        ("identities:\n- role: viewer", "f:2: identities[0].name: is missing"),
        ("identities: [alice]", "each of them must be a section"),
        (f"identities: [{{name: a b, role: agent, token_sha256: {HASH}}}]", "name: may hold letters"),
        (
            f"identities: [{{name: a, role: admin, token_sha256: {HASH}}}]",
            "agent, viewer, operator, not admin",
        ),
        ("identities: [{name: a, role: agent}]", "must have either token_sha256 or certificate"),
        (f"identities: [{{{GOOD}, certificate: a}}]", "must have either token_sha256 or certificate"),
        (f"identities: [{{{GOOD}, jobs: []}}]", "jobs: must be a pattern"),
        (f"identities: [{{{GOOD}, jobs: {{a: b}}}}]", "jobs: must be a pattern"),
        (f"identities: [{{name: a, role: agent, token_sha256: {HASH[1:]}}}]", "64 digits"),
        (f"identities: [{{name: a, role: agent, token_sha256: {HASH.upper()}}}]", "64 digits"),
        (
            f"identities:\n- {{{GOOD}}}\n- {{{GOOD}}}",
            "f:3: identities[1].name: a is there twice; first in line 2",
        ),
        (f"identities:\n- {{{GOOD}}}\n- {{{GOOD.replace('a,', 'b,', 1)}}}", "another identity has the same"),
        (
            "identities: [{name: a, role: agent, certificate: c}, {name: b, role: agent, certificate: c}]",
            "certificate: another identity has the same",
        ),
        ("identities: &x []", "aliases are not allowed"),
        ("identities: !!python/object:os.system []", "tags are not allowed"),
        ("identities: [", "this is not YAML"),
        ("x" * 70_000, "at most 65536 are read"),
        # Whoever names the token's own file, or puts a token where its hash belongs, finds it in no log.
        (TOKEN, "must be a section"),
        (f"identities: {TOKEN}", "must be a list"),
        (f"identities: [{TOKEN}]", "must be a section"),
        (f"identities: [{{name: a, role: agent, token_sha256: {TOKEN}}}]", "64 digits"),
        (f"identities: [{{name: a, role: agent, token: {TOKEN}}}]", "token: unknown key"),
    ],
)
def test_a_file_of_no_use_says_where_and_why(text, says):
    with pytest.raises(AccessError) as caught:
        read_identities(text.encode(), "f")
    assert says in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_nothing_of_a_token_is_kept_or_shown(tmp_path):
    path = tmp_path / "identities.yaml"
    path.write_text(f"identities: [{{{GOOD}}}]")
    access = Access(token=OTHER, identities=path)
    for shown in (repr(access), repr(access.known()), repr(access.known().by_digest)):
        assert TOKEN not in shown
        assert OTHER not in shown


# ---------------------------------------------------------------- who is it?

KNOWN = Known({digest(TOKEN): ALICE, digest(OTHER): ANYBODY}, {"node0": NODE, "n1": NODE, "alice": ALICE})


@pytest.mark.parametrize(
    ("token", "certificate", "is_"),
    [
        (TOKEN, (), ALICE),
        (OTHER, (), ANYBODY),
        (None, ("node0",), NODE),
        (None, ("else", "node0", "n1"), NODE),
        (None, ("else",), None),
        (None, (), None),
        ("gw_unknown", ("node0",), None),
        # A certificate that names nobody takes nothing away.
        (TOKEN, ("else",), ALICE),
        # The shared token is nobody's: it says no other than the certificate.
        (OTHER, ("node0",), ANYBODY),
        (TOKEN, ("node0",), None),
        (None, ("node0", "alice"), None),
    ],
)
def test_who_it_is(token, certificate, is_):
    found = admit(None if token is None else f"Bearer {token}", certificate, KNOWN)
    assert (None if isinstance(found, Refused) else found) == is_
    assert TOKEN not in repr(found)


def test_where_nothing_is_to_be_shown_everybody_may_everything():
    assert admit(None, (), Access().known()) == ANYBODY
    assert admit("Bearer x", ("y",), Access().known()) == ANYBODY


def test_an_identity_that_has_the_shared_token_too_is_the_narrower_of_the_two(tmp_path):
    path = tmp_path / "identities.yaml"
    path.write_text(f"identities: [{{{GOOD}}}]")
    found = admit(f"Bearer {TOKEN}", (), Access(token=TOKEN, identities=path).known())
    assert found == Identity("a", Role.VIEWER)


def test_the_names_in_a_certificate():
    assert names.of_grpc({}) == names.of_http(None) == names.of_http({}) == frozenset()
    context = {
        "x509_common_name": [b"node0"],
        "x509_subject_alternative_name": [b"node0.example", b"spiffe://c/n", b"a@b", b"10.0.0.1"],
        "peer_dns": [b"node0.example"],
        "peer_uri": [b"spiffe://c/n"],
        "peer_email": [b"a@b"],
        "transport_security_type": [b"ssl"],
    }
    certificate = {
        "subject": ((("organizationName", "o"),), (("commonName", "node0"),)),
        "subjectAltName": (
            ("DNS", "node0.example"), ("URI", "spiffe://c/n"), ("email", "a@b"), ("IP Address", "10.0.0.1"),
        ),
    }  # fmt: skip
    assert names.of_grpc(context) == names.of_http(certificate) == {"node0", "node0.example", "spiffe://c/n"}


# ---------------------------------------------------------------- whose report is it?


@pytest.mark.parametrize(
    ("what", "foreign"),
    [
        ([batch("m", 0, hello(0))], None),
        ([batch("m", 0, hello(0, job="llm-7b"))], None),
        ([batch("m", 0, hello(0, job="theirs"))], "theirs"),
        # Every record that names a job counts, wherever it stands.
        ([batch("m", 0, hello(0), launch_started(job="other"))], "other"),
        ([batch("m", 0, hello(0)), batch("o", 0, replace(launch_ended(), job="other"))], "other"),
        ([batch("o", 0, obs.CommandStarted("other", 0, "l"))], "other"),
        ([batch("o", 0, obs.CheckpointRoot("other", 0, "n", "/r", "", "l"))], "other"),
        ([batch("o", 0, obs.Unwatched("other", 0, "n", 1, None, None, "why"))], "other"),
        # A journal is of the job that it named first, whatever is said of it now.
        ([batch("t", 1, nonfinite(1))], "theirs"),
        ([batch("t", 1, hello(0))], "theirs"),
        ([batch("t", 7, obs.TaskDone("d", obs.TaskKind.SCAN, "", ()))], "theirs"),
        ([progress("t", 3, 1)], "theirs"),
        # What is of no known journal and names no job is dropped by the fold.
        ([batch("nobody", 1, nonfinite(1)), progress("nobody", 3, 1)], None),
    ],
)
def test_whose_report_it_is(what, foreign):
    known = Told().tell(batch("t", 0, hello(0, job="theirs"))).state.journals
    why = why_not_taken(NODE, report(*what), known)
    if foreign is None:
        assert why is None
    else:
        assert why == f"identity 'node' may not report for job {foreign!r}: it is bound to the jobs j, llm-*"
    assert why_not_taken(ANYBODY, report(*what), known) is None


def test_every_record_that_is_about_a_job_says_so_in_the_same_field():
    """Else a new one could be of a job that nobody checks."""
    named = {
        body.__name__ for body in get_args(obs.Body) for name in body.__dataclass_fields__ if "job" in name
    }
    assert named == {body.__name__ for body in get_args(obs.Body) if "job" in body.__dataclass_fields__}
    assert {"Hello", "LaunchStarted", "CheckpointRoot"} < named
