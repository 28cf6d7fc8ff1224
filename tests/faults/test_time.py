"""Time: a deadline that passes, clocks an hour off, certificates that run out."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.clocks import WrongClock
from tests.faults.federation import SERVER, SITES, Federation, Undisturbed, joined
from tests.faults.record import keep
from uharmony_model.atomic import write_atomic
from uharmony_server.certificates import server_certificate
from uharmony_service.keys import lifetime, load_certificate

LIFE_HOURS = 0.05
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.faults]


def test_a_slow_site_past_the_deadline(federation: Federation, wanted, tmp_path: Path):
    federation.settings(deadline_minutes=0.5)
    # Sites first: a slow start is not what this deadline is for.
    for name in SITES:
        federation.start_site(name)
    federation.wait_for(
        lambda: all(federation.state(name) == "waiting" for name in SITES), 180, "the sites"
    )
    federation.start_server()
    federation.await_training("beta", 2)
    since = time.monotonic()
    federation.signal("beta", "site", signal.SIGSTOP)
    federation.recovery("a site slower than the deadline (30 s)", since,
                        federation.has_round(2), to="the checkpoint without it",
                        note="equal to the run with its participation record")  # fmt: skip
    federation.signal("beta", "site", signal.SIGCONT)
    weights = federation.end()
    taken = federation.check_participation(wanted, weights, tmp_path / "again")
    assert taken.rounds[2].counted == ("alpha", "gamma")
    assert taken.rounds[2].trained == SITES, "its update was not recorded as trained in vain"
    late = [r for r in federation.refusals() if r["reason"] == "late"]
    assert ("beta", 2) in {(r["site"], r["round"]) for r in late}
    assert "beta" in taken.rounds[5].counted, "it did not come back by itself"
    assert weights != wanted.weights


def test_the_shim_shows_another_time(tmp_path: Path):
    clock = WrongClock(tmp_path, 3600)
    says = "import time; print(time.time())"
    told = subprocess.run(
        [sys.executable, "-c", says], env=clock.environment, capture_output=True, check=True
    )
    assert abs(float(told.stdout) - time.time() - 3600) < 60


def test_sites_whose_clocks_are_an_hour_off(federation: Federation, wanted, tmp_path: Path):
    fast, slow = WrongClock(tmp_path / "fast", 3600), WrongClock(tmp_path / "slow", -3600)
    federation.start_server()
    federation.start_site("alpha")
    federation.start_site("beta", fast.environment)
    federation.start_site("gamma", slow.environment)
    federation.check_undisturbed(wanted, federation.end())
    assert "this clock is +3600 s off" in federation.log("beta", "supernode")
    assert "this clock is -3600 s off" in federation.log("gamma", "supernode")
    keep("site clocks an hour fast and an hour slow", "no round lost")


def test_a_site_whose_clock_jumps_an_hour(federation: Federation, wanted, tmp_path: Path):
    clock = WrongClock(tmp_path / "clock")
    federation.start_server()
    federation.start_site("alpha", clock.environment)
    federation.start_site("beta")
    federation.start_site("gamma")
    for round_, seconds in ((2, 3600), (4, -3600)):
        federation.await_training("alpha", round_)
        since = time.monotonic()
        clock.set(seconds)
        federation.recovery("a site's clock that jumps by an hour, then back by two", since,
                            federation.has_round(round_),
                            to="the checkpoint")  # fmt: skip
    federation.check_undisturbed(wanted, federation.end())


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_coordinator_whose_clock_is_an_hour_off(federation, wanted, tmp_path, seconds):
    clock = WrongClock(tmp_path / "clock", seconds)
    federation.start_server_with(clock.environment)
    for name in SITES:
        federation.start_site(name)
    federation.check_undisturbed(wanted, federation.end())
    word = "fast" if seconds > 0 else "slow"
    keep(f"the coordinator's clock an hour {word}", "no round lost")


def test_certificates_that_run_out(wanted: Undisturbed, tmp_path: Path):
    """All of them live three minutes; the study lasts longer."""
    made = joined(tmp_path / "short", wanted, certificate_hours=LIFE_HOURS)
    try:
        files = [made.server / "tls" / "server.pem"]
        # The coordinator's own was signed before its lifetime was set.
        ca, key = made.server / "ca", made.server / "tls" / "server.key"
        short = server_certificate(
            ca / "ca.key", ca / "ca.pem", key, ["localhost", "127.0.0.1"], LIFE_HOURS
        )
        write_atomic(files[0], short)
        files += [made.store(name) / "identity" / "tls.pem" for name in SITES]
        ends = {path: lifetime(load_certificate(path))[1] for path in files}
        made.start_all()
        made.await_round(1)
        made.call(SERVER, "pause", "--dir", str(made.server))
        time.sleep(max(0.0, max(ends.values()) + 5 - time.time()))
        stood, since = made.round(), time.monotonic()
        made.call(SERVER, "resume", "--dir", str(made.server))
        made.recovery("certificates that ran out during the study", since,
                      lambda: made.round() > stood, to="the next checkpoint after they ran out",
                      note="lifetime 180 s, renewed by themselves")  # fmt: skip
        made.check_undisturbed(wanted, made.end())
        for path, end in ends.items():
            assert lifetime(load_certificate(path))[1] > end, f"{path} was not renewed"
        for name in SITES:
            assert "renewed" in (made.folder / f"{name}.log").read_text()
    finally:
        made.kill_everything()
