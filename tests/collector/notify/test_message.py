"""What a webhook is told can be verified by the library of those who wrote the specification."""

from __future__ import annotations

import base64
import json
import time

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from gradwatch.collector import document
from gradwatch.collector.notify import message
from tests.collector.history import Told, batch, nonfinite, progress

SECRET = bytes(range(32))
HANDED_OUT = "whsec_" + base64.b64encode(SECRET).decode()


def incident():
    told = (
        Told()
        .hellos(2)
        .tell(
            batch("r1", 1, nonfinite(5)),
            progress("r0", 6, 1, last_bad_round=5),
            progress("r1", 6, 2, last_bad_round=5, bad_rounds=1),
        )
    )
    return document.incident(told.incident)


def test_the_receivers_library_accepts_it_and_nothing_else():
    known = incident()
    content = message.body(known)
    headers = message.headers(known.id, SECRET, time.time(), content)
    told = Webhook(HANDED_OUT).verify(content, headers)
    assert told["type"] == "incident.confirmed"
    assert told["data"]["id"] == known.id
    assert told["data"]["first"]["rank"] == 1
    assert told["data"]["verdict"] == known.verdict
    for wrong in (
        lambda: Webhook(HANDED_OUT).verify(content.replace(b'"rank":1', b'"rank":0'), headers),
        lambda: Webhook(base64.b64encode(b"x" * 32).decode()).verify(content, headers),
        lambda: Webhook(HANDED_OUT).verify(content, {**headers, "webhook-id": "other"}),
        # Five minutes is what the specification lets a message be old.
        lambda: Webhook(HANDED_OUT).verify(
            content, message.headers(known.id, SECRET, time.time() - 301, content)
        ),
    ):
        with pytest.raises(WebhookVerificationError):
            wrong()


def test_the_body_is_the_incident_without_how_it_came_to_it():
    told = json.loads(message.body(incident()))["data"]
    assert "flight" not in told
    assert {"id", "job", "cause", "step", "first", "verdict", "likely", "decisions"} <= told.keys()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not base64!", "not base64"),
        (base64.b64encode(b"short").decode(), "5 bytes, and must have 24 to 64"),
        (base64.b64encode(b"x" * 65).decode(), "65 bytes"),
        ("", "0 bytes"),
    ],
)
def test_a_secret_that_is_none_is_said_without_showing_it(text, says):
    with pytest.raises(ValueError, match=says) as caught:
        message.read_secret(text)
    assert not text or text not in str(caught.value)


def test_a_secret_is_read_with_and_without_its_prefix():
    assert message.read_secret(HANDED_OUT) == message.read_secret(HANDED_OUT[6:] + "\n") == SECRET
