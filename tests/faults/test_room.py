"""No room: a full disk at a site and at the coordinator, no memory in the middle of training."""

from __future__ import annotations

import os
import resource
import signal
import time

import pytest

from tests.faults.federation import Federation, Undisturbed
from tests.faults.rooms import fill, free, small_disk

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.faults]
FULL_SECONDS = 20.0
TOO_LITTLE = 200 << 20  # bytes of address space; PyTorch alone takes more


def test_a_full_disk_at_a_site(federation: Federation, wanted: Undisturbed):
    store = federation.store("beta")
    with small_disk(store, 24):
        federation.start_all()
        federation.await_training("beta", 2)
        fill(store)
        time.sleep(FULL_SECONDS)
        assert federation.round() == 1, "a round was closed without the site"
        assert not federation.generation("beta", 2).is_dir()
        assert federation.processes["beta"].poll() is None, "the site's service has ended"
        free(store)
        since = time.monotonic()
        federation.recovery("a full disk at a site, freed again after 20 s", since,
                            federation.has_round(2),
                            to="the checkpoint, from the freeing")  # fmt: skip
        federation.check_undisturbed(wanted, federation.end())
        federation.kill_everything()


def test_a_full_disk_at_the_coordinator(federation: Federation, wanted: Undisturbed):
    with small_disk(federation.server, 24):
        federation.start_all()
        federation.await_training("beta", 2)
        fill(federation.server)
        time.sleep(FULL_SECONDS)
        assert federation.round() == 1
        assert federation.processes["server"].poll() is None, "the service has ended"
        free(federation.server)
        since = time.monotonic()
        federation.recovery("a full disk at the coordinator, freed again after 20 s", since,
                            federation.has_round(2),
                            to="the checkpoint, from the freeing")  # fmt: skip
        federation.check_undisturbed(wanted, federation.end())
        federation.kill_everything()


def test_no_memory(federation: Federation, wanted: Undisturbed):
    """Killed in a step as the kernel does it; its successor gets too little to load PyTorch."""
    federation.start_all()
    federation.await_training("beta", 2)
    first = federation.running("beta", "site")
    since = time.monotonic()
    os.kill(first, signal.SIGKILL)
    second = successor(federation, first)
    _, hard = resource.prlimit(second, resource.RLIMIT_AS)
    resource.prlimit(second, resource.RLIMIT_AS, (TOO_LITTLE, hard))
    third = successor(federation, second)
    assert resource.prlimit(third, resource.RLIMIT_AS)[0] != TOO_LITTLE
    federation.recovery("the site process killed for want of memory in a step, and its successor "
                        "out of memory", since, federation.has_round(2),
                        to="the checkpoint")  # fmt: skip
    assert "round 2 goes on after step" in federation.log("beta", "site")
    said = (federation.folder / "beta.log").read_text()
    assert said.count("site ended with") == 2
    federation.check_undisturbed(wanted, federation.end())


def successor(federation: Federation, pid: int) -> int:
    """The process that the service starts in place of one that has ended."""
    federation.wait_for(
        lambda: federation.pid("beta", "site") not in (pid, None), 120, "another site process"
    )
    return federation.running("beta", "site")
