"""Who takes part: a site revoked in the middle of a round, a site with another version."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.federation import SERVER, Federation, Undisturbed
from tests.faults.record import keep
from uharmony_model import __version__

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.faults]


def test_a_site_revoked_in_the_middle_of_a_round(federation: Federation, wanted, tmp_path: Path):
    federation.start_all()
    federation.await_training("beta", 2)
    federation.signal("beta", "site", signal.SIGSTOP)
    for name in ("alpha", "gamma"):
        federation.await_generation(name, 2)
    since = time.monotonic()
    federation.call(SERVER, "revoke", "beta", "--dir", str(federation.server))
    federation.recovery("a site revoked in the middle of a round", since,
                        federation.has_round(2), to="the checkpoint without it",
                        note="equal to the run with its participation record")  # fmt: skip
    federation.signal("beta", "site", signal.SIGCONT)
    weights = federation.end()
    taken = federation.check_participation(wanted, weights, tmp_path / "again", lost={"beta": {2}})
    assert [found.counted for _, found in sorted(taken.rounds.items())] == [
        ("alpha", "beta", "gamma"),
        *[("alpha", "gamma")] * 4,
    ]


def test_a_site_with_another_version(federation: Federation, wanted: Undisturbed, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    major = int(__version__.split(".")[0]) + 1
    (other / "sitecustomize.py").write_text(
        f"import uharmony_model\nuharmony_model.__version__ = '{major}.0.0'\n"
    )
    path = os.pathsep.join([str(other), *filter(None, [os.environ.get("PYTHONPATH")])])
    federation.start_server()
    federation.start_site("gamma", {"PYTHONPATH": path})
    federation.wait_for(
        lambda: "hello" in federation.log("gamma", "supernode"), 120, "the greeting of gamma"
    )
    federation.start_site("alpha")
    federation.start_site("beta")
    federation.await_round(2)
    federation.call(SERVER, "pause", "--dir", str(federation.server))
    refused = [r for r in federation.refusals() if r["site"] == "gamma"]
    assert {r["reason"] for r in refused} == {"not_agreed"}
    detail = str(refused[0]["detail"])
    assert f"{major}.0.0" in detail
    assert __version__ in detail
    assert not federation.updates("gamma")
    assert federation.unfinished("gamma") == (0, 0)
    assert not list(federation.generation("gamma", 1).parent.glob("round-*"))
    federation.stop(["gamma"])
    federation.start_site("gamma")
    federation.wait_for(
        lambda: (federation.store("gamma") / "run" / "node").is_file(), 120, "gamma's connection"
    )
    federation.call(SERVER, "resume", "--dir", str(federation.server))
    weights = federation.end()
    taken = federation.check_participation(wanted, weights, tmp_path / "again")
    assert "gamma" in taken.rounds[5].counted
    assert "gamma" not in taken.rounds[1].trained
    keep("a site with another major version", "refused when greeted, trained nothing; "
         "after the right version was started it took part", None)  # fmt: skip
