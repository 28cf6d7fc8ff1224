"""No room: a full disk at a site and at the coordinator, no memory in the middle of training."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from tests.faults.federation import Federation, Undisturbed
from tests.faults.rooms import fill, free, small_disk

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.faults]
FULL_SECONDS = 20.0


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


def memory(pid: int) -> int:
    """The address space of a process in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def test_no_memory_while_training(federation: Federation, wanted: Undisturbed):
    """No further page for the site process: an allocation in a step, or soon after, fails."""
    federation.start_all()
    federation.await_training("beta", 2)
    pid = federation.running("beta", "site")
    since = time.monotonic()
    _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (min(memory(pid), 1 << 20), hard))
    federation.wait_for(
        lambda: federation.pid("beta", "site") not in (pid, None), 60, "the end of the process"
    )
    ended = time.monotonic() - since
    federation.recovery("no memory for the site process in training", since,
                        federation.has_round(2), to="the checkpoint",
                        note=f"the process was another one after {ended:.1f} s")  # fmt: skip
    said = federation.log("beta", "site")
    assert any(w in said for w in ("MemoryError", "out of memory", "allocate memory", "bad_alloc"))
    federation.check_undisturbed(wanted, federation.end())
