"""A bad line: an upload cut in the middle, a minute without a network, a silent black hole."""

from __future__ import annotations

import time

import pytest

from tests.faults.chaos import Chaos
from tests.faults.federation import Federation, Undisturbed

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.faults]


def test_an_upload_cut_in_the_middle(federation: Federation, wanted: Undisturbed):
    with Chaos(federation.port) as line:
        federation.reach_through("beta", line.port)
        federation.start_all()
        federation.await_round(1)
        size = federation.updates("beta")[0].bytes
        for round_, times in ((2, 1), (3, 3)):
            federation.await_training("beta", round_)
            cuts = len(line.cuts)
            line.cut(after=size // 2, times=times)
            federation.await_generation("beta", round_)
            since = time.monotonic()
            federation.recovery("an upload cut in the middle, and again three times in a row",
                                since, federation.has_round(round_),
                                to="the checkpoint",
                                note=f"cut after {size // 2} of {size} bytes")  # fmt: skip
            assert line.cuts[cuts:] == [size // 2] * times
        federation.check_undisturbed(wanted, federation.end())


def test_a_minute_without_a_network(federation: Federation, wanted: Undisturbed):
    with Chaos(federation.port) as line:
        federation.reach_through("beta", line.port)
        federation.start_all()
        federation.await_training("beta", 2)
        line.partition()
        time.sleep(60)
        assert federation.round() == 1, "the round was closed without the site"
        assert federation.generation("beta", 2).is_dir(), "the site did not work on"
        line.heal()
        since = time.monotonic()
        federation.recovery("a partition of 60 s", since, federation.has_round(2),
                            to="the checkpoint, from the end of the partition")  # fmt: skip
        federation.check_undisturbed(wanted, federation.end())


def test_a_black_hole_is_noticed(federation: Federation, wanted: Undisturbed):
    """No end, no reset: bytes go in and nothing comes out."""
    with Chaos(federation.port) as line:
        federation.reach_through("beta", line.port)
        federation.start_all()
        federation.await_training("beta", 2)
        before, since = len(line.opened), time.monotonic()
        assert line.black_hole(), "there was no connection"
        federation.wait_for(lambda: len(line.opened) > before, 120, "a new connection")
        noticed = line.opened[before] - since
        federation.recovery("connections that are a black hole", since,
                            federation.has_round(2), to="the checkpoint",
                            note=f"a new connection after {noticed:.1f} s")  # fmt: skip
        assert noticed <= 40
        federation.check_undisturbed(wanted, federation.end())
