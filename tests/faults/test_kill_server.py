"""A coordinator that is killed: its parts one by one, the whole of it, and everything at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.faults.federation import SITES, Federation, Undisturbed

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def next_round(federation: Federation):
    """True when one more checkpoint is on disk."""
    stood = federation.round()
    return lambda: federation.round() > stood


def sent_more(federation: Federation, names: list[str], before: dict[str, int]):
    """True when each of these sites has handed over one more answer."""
    return lambda: all(federation.sent(name) > before[name] for name in names)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("program", "named"),
    [
        ("superlink", "kill -9 of SuperLink while sites train"),
        ("gateway", "kill -9 of the gateway while sites train"),
        ("rounds", "kill -9 of the rounds process while it waits"),
    ],
)
def test_a_part_killed_twice_while_it_waits(federation, wanted, program, named):
    federation.start_all()
    for round_ in (2, 4):
        federation.await_training("alpha", round_)
        progress, since = next_round(federation), time.monotonic()
        federation.signal("server", program)
        federation.recovery(named, since, progress, to="the next checkpoint")
        assert federation.round() == round_
    federation.check_undisturbed(wanted, federation.end())


@pytest.mark.faults
def test_the_whole_coordinator_killed_while_it_waits(federation: Federation, wanted: Undisturbed):
    federation.start_all()
    for round_ in (1, 3):
        federation.await_training("alpha", round_)
        progress, since = next_round(federation), time.monotonic()
        federation.kill("server")
        federation.start_server()
        federation.recovery("kill -9 of the whole coordinator while it waits, started again",
                            since, progress, to="the next checkpoint")  # fmt: skip
    federation.check_undisturbed(wanted, federation.end())


@pytest.mark.faults
def test_the_rounds_killed_while_they_aggregate(federation: Federation, wanted: Undisturbed):
    """When the last update has been handed over, the sum is a few hundredths of a second away."""
    federation.start_all()
    hit = 0
    for round_, later in ((1, 0.0), (2, 0.03), (3, 0.06), (4, 0.12)):
        federation.await_training("gamma", round_)
        pid = federation.running("server", "rounds")
        sent = {name: federation.sent(name) for name in SITES}
        # One answer a round; who had sent already is not waited for.
        done = [n for n in SITES if federation.generation(n, round_).is_dir()]
        awaited = [n for n in SITES if n not in done]
        federation.wait_for(sent_more(federation, awaited, sent), 120, "all updates")
        time.sleep(later)
        since = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        hit += federation.round() < round_
        federation.recovery("kill -9 of the rounds process when all updates have come", since,
                            federation.has_round(round_), to="the checkpoint",
                            note=f"{hit} of 4 kills came before the checkpoint")  # fmt: skip
    assert hit, "every kill came too late"
    federation.check_undisturbed(wanted, federation.end())


@pytest.mark.faults
def test_the_rounds_killed_while_they_write_a_checkpoint(federation: Federation, wanted):
    federation.start_all()
    caught = 0
    for round_ in (1, 2, 3, 4):
        federation.await_training("gamma", round_)
        pid = federation.running("server", "rounds")
        folder = federation.server / "rounds"
        end = time.monotonic() + 120
        while not (begun := list(folder.glob(f".round-{round_:06d}.tmp-*"))):
            if federation.round() >= round_:
                break
            assert time.monotonic() < end, "no checkpoint is written"
        since = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        caught += bool(begun) and federation.round() < round_
        federation.recovery("kill -9 of the rounds process while it writes a checkpoint", since,
                            federation.has_round(round_),
                            to="the checkpoint",
                            note=f"{caught} of 4 kills left a half-written one")  # fmt: skip
    assert not list((federation.server / "rounds").glob(".*"))
    federation.check_undisturbed(wanted, federation.end())


@pytest.mark.faults
def test_everything_killed_at_once(federation: Federation, wanted: Undisturbed):
    federation.start_all()
    for round_ in (2, 4):
        federation.await_training("alpha", round_)
        progress, since = next_round(federation), time.monotonic()
        federation.kill_everything()
        federation.start_all()
        federation.recovery("kill -9 of everything at once, started again", since, progress,
                            to="the next checkpoint")  # fmt: skip
    federation.check_undisturbed(wanted, federation.end())


@pytest.mark.faults_quick
def test_coordinator_and_a_site_killed(federation: Federation, wanted: Undisturbed):
    """The short form of all of the above, in every test run."""
    federation.start_all()
    federation.await_training("alpha", 1)
    progress, since = federation.goes_on("alpha", 1), time.monotonic()
    federation.signal("alpha", "site")
    federation.recovery("kill -9 of a site (short form)", since, progress,
                        to="the next steps at the site")  # fmt: skip
    federation.await_training("beta", 3)
    progress, since = next_round(federation), time.monotonic()
    federation.kill("server")
    federation.start_server()
    federation.recovery("kill -9 of the coordinator (short form)", since, progress,
                        to="the next checkpoint")  # fmt: skip
    federation.check_undisturbed(wanted, federation.end())
