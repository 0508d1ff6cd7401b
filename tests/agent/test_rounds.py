"""Looking at a device: results arrive rounds later, in order, and no slot is reused too early."""

from __future__ import annotations

import math

import torch

from gradwatch.agent.probe.device_look import SLOTS, DeviceLook
from gradwatch.agent.probe.look import HostLook
from gradwatch.agent.probe.rounds import Bucket, Moment


class Device:
    """Hands out events that pass only when told: a device that is behind."""

    def __init__(self):
        self.events = []

    def event(self):
        event = Event()
        self.events.append(event)
        return event


class Event:
    def __init__(self):
        self.recorded = False
        self.passed = False

    def record(self):
        self.recorded, self.passed = True, False

    def query(self):
        return self.passed

    def synchronize(self):
        self.passed = True


def moment(number):
    return Moment(root=0, round=number, step=number, microbatch=0, batch=None, order=[])


def bucket(*gradients):
    return Bucket(0, torch.cat([g.flatten() for g in gradients]), lambda: list(enumerate(gradients)))


def device_look(device, lost=None):
    told = [] if lost is None else lost
    return DeviceLook(16, torch.device("cpu"), device.event, told.append, with_flag=False)


BAD = torch.tensor([1.0, math.nan])
GOOD = torch.ones(2)


def test_nothing_is_known_before_the_event_has_passed():
    device = Device()
    look = device_look(device)
    now = moment(0)
    assert look.local(now, bucket(GOOD, BAD), brief=False) is None
    assert look.reduced(now, [BAD]) is None
    assert look.arrived() == []
    for event in device.events:
        event.passed = event.recorded
    (result,) = look.arrived()
    assert result.moment is now
    assert [bad.key for bad in result.findings[0].gradients] == [1]
    assert result.reduced_bad is True
    assert look.arrived() == []


def test_rounds_arrive_in_order_even_if_a_later_one_passes_first():
    device = Device()
    look = device_look(device)
    for number in range(3):
        look.local(moment_ := moment(number), bucket(GOOD), brief=False)
        look.reduced(moment_, [GOOD])
    recorded = [event for event in device.events if event.recorded]
    recorded[-1].passed = True
    order = [result.moment.round for result in look.arrived(wait=True)]
    assert order == [0, 1, 2]


def test_a_device_that_is_too_far_behind_loses_rounds_and_says_so():
    device, lost = Device(), []
    look = device_look(device, lost)
    for number in range(SLOTS + 3):
        now = moment(number)
        look.local(now, bucket(BAD), brief=False)
        look.reduced(now, [BAD])
    assert lost == ["device_behind"] * 3
    results = look.arrived(wait=True)
    # The unseen ones are handed out too, without findings, so that the clock goes on.
    assert [result.moment.round for result in results] == list(range(SLOTS + 3))
    assert [bool(result.findings) for result in results] == [True] * SLOTS + [False] * 3


def test_a_round_whose_reduction_was_not_looked_at_still_arrives():
    device = Device()
    look = device_look(device)
    look.local(moment(0), bucket(BAD), brief=False)
    look.local(moment(1), bucket(GOOD), brief=False)
    (first,) = look.arrived(wait=True)
    assert first.reduced_bad is None
    assert first.findings


def test_the_host_knows_at_once():
    look = HostLook()
    found = look.local(moment(3), bucket(GOOD, BAD, GOOD), brief=False)
    assert [(bad.key, bad.value, bad.count) for bad in found.gradients] == [(1, "VALUE_NAN", 1)]
    assert look.local(moment(4), bucket(GOOD), brief=False) is None
    assert math.isnan(look.reduced(moment(3), [GOOD, BAD]))
    assert look.reduced(moment(4), [GOOD]) == 0.0


def test_a_brief_look_still_tells_bad_from_good_at_the_maximum():
    look = HostLook()
    largest = torch.full((4,), torch.finfo(torch.float32).max)
    assert look.local(moment(0), bucket(BAD), brief=True).gradients == []
    assert look.local(moment(1), bucket(largest), brief=True) is None
