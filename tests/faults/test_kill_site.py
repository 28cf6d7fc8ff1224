"""A site that is killed: while it trains, before it sends, after it has sent, and parts of it."""

from __future__ import annotations

import signal
import time

import pytest

from tests.faults.federation import Federation, Undisturbed
from uharmony_simulation.deployed import kill_tree

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def steps_lost(federation: Federation, name: str) -> str:
    """Evidence from the site's log that training was taken up where it was."""
    found = [w for w in federation.log(name, "site").splitlines() if "goes on after step" in w]
    assert found, "the round was begun anew"
    return found[-1].rpartition("INFO ")[2]


@pytest.mark.faults
def test_killed_while_training_and_around_sending(federation: Federation, wanted: Undisturbed):
    federation.start_all()

    federation.await_training("alpha", 1)
    progress, since = federation.goes_on("alpha", 1), time.monotonic()
    federation.signal("alpha", "site")
    federation.recovery("kill -9 of the site process in training", since, progress,
                        to="the next steps at the site")  # fmt: skip
    assert "round 1 goes on after step" in steps_lost(federation, "alpha")

    federation.await_training("alpha", 2)
    progress, since = federation.goes_on("alpha", 2), time.monotonic()
    federation.kill("alpha")
    federation.start_site("alpha")
    federation.recovery("kill -9 of a whole site in training, started again", since, progress,
                        to="the next steps at the site")  # fmt: skip
    assert "round 2 goes on after step" in steps_lost(federation, "alpha")

    federation.await_training("beta", 3)
    tree = federation.processes["beta"].pid
    # Held up, its SuperNode carries nothing: however late the kill comes, it is before sending.
    federation.signal("beta", "supernode", signal.SIGSTOP)
    federation.await_generation("beta", 3)
    kill_tree(tree)
    since = time.monotonic()
    federation.processes.pop("beta").wait()
    before = [e for e in federation.updates("beta") if e.round == 3]
    federation.start_site("beta")
    federation.recovery("kill -9 of a site after training, before sending", since,
                        federation.has_round(3), to="the end of the round",
                        note=f"{len(before)} entries in its ledger when it was killed")  # fmt: skip
    assert len(before) < 2, "it made its answer more than once"

    # Held up, gamma keeps the round open until beta's update has arrived and beta is gone.
    federation.await_training("gamma", 4)
    federation.signal("gamma", "site", signal.SIGSTOP)
    sent = federation.sent("beta")
    federation.await_generation("beta", 4)
    federation.wait_for(lambda: federation.sent("beta") > sent, 60, "beta's update")
    since = time.monotonic()
    federation.kill("beta")
    federation.start_site("beta")
    federation.signal("gamma", "site", signal.SIGCONT)
    federation.recovery("kill -9 of a site after sending", since,
                        federation.has_round(4), to="the end of the round")  # fmt: skip

    federation.await_training("gamma", 5)
    progress, since = federation.goes_on("gamma", 5), time.monotonic()
    federation.signal("gamma", "supernode")
    federation.recovery("kill -9 of the SuperNode in training", since,
                        federation.has_round(5), to="the end of the round")  # fmt: skip

    federation.check_undisturbed(wanted, federation.end())
