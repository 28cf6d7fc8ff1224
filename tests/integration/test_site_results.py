"""A hospital's own results after a federation in one process: both models, the page, the rows."""

from __future__ import annotations

import csv
import dataclasses
import re
import statistics
from pathlib import Path

import pytest
import torch

from tests.support.tiny import tiny_study, write_folder
from uharmony_client.alone import alone_model, alone_site, train_alone
from uharmony_client.flower_app import make_client_app
from uharmony_client.site import Site
from uharmony_client.site_models import federated_model, keep_federated_model
from uharmony_client.site_report import write_site_report
from uharmony_client.site_results import SiteResults, evaluate_site
from uharmony_model.bundle import load_bundle
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.exchange.schema import unflatten
from uharmony_model.initial import initial_weights
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.rounds import run_rounds
from uharmony_simulation.arms import Arm, Machine, SiteOpener
from uharmony_simulation.config import Simulation
from uharmony_simulation.engine import InProcessGrid
from uharmony_simulation.sites import make_sites

SITES = ("alpha", "gamma")
CASES = {"alpha": 8, "gamma": 5}
SOURCE = {"source": {"kind": "folder", "sites_from": "column"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "volumes", CASES)


def federate(folder: Path, data: Path, method: str) -> tuple[SiteOpener, Checkpoint]:
    study = tiny_study(method=method)
    make_sites(study, Simulation.model_validate(SOURCE), data, folder / "sites")
    arm = Arm.of(study, method, study.seed, SITES)
    opener = SiteOpener(arm, folder / "sites", Machine(threads=1, device="cpu"))
    schema, initial = initial_weights(arm.study)
    grid = InProcessGrid(make_client_app(opener), arm.sites)
    return opener, run_rounds(arm.study, schema, initial, grid, folder / "server")


@pytest.fixture(scope="module")
def federated(tmp_path_factory, data) -> tuple[SiteOpener, Checkpoint]:
    return federate(tmp_path_factory.mktemp("uharmony"), data, "uharmony")


@pytest.fixture(scope="module")
def local_arm(tmp_path_factory, data) -> SiteOpener:
    return federate(tmp_path_factory.mktemp("local"), data, "local")[0]


@pytest.fixture(scope="module")
def results(federated) -> tuple[Site, SiteResults]:
    opener, state = federated
    site = opener.named("alpha")
    shared = unflatten(state.global_, state.schema)
    folder = keep_federated_model(site, shared, state.round)
    train_alone(site)
    return site, evaluate_site(site, folder)


def fresh(site: Site, store: Path) -> Site:
    """The same data with an empty store."""
    return dataclasses.replace(site, config=site.config.model_copy(update={"store": store}))


def last_local(site: Site) -> dict[str, torch.Tensor]:
    found = site.store.before(site.study.digest, 99)
    assert found is not None
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", SITES)
def test_trained_alone_equals_the_local_arm_to_the_last_bit(federated, local_arm, tmp_path, name):
    site = fresh(federated[0].named(name), tmp_path / "store")
    folder = train_alone(site)
    arm = local_arm.named(name)
    own = alone_site(site)
    assert own.study.digest == arm.study.digest
    assert_equal(last_local(own), last_local(arm))
    network = load_bundle(folder, name).network.state_dict()
    parameters = {k: v for k, v in last_local(arm).items() if not k.startswith("optimizer/")}
    assert_equal({key: network[key] for key in parameters}, parameters)
    for round_ in (1, 2, 3):
        rows = f"validation-round-{round_:06d}.csv"
        assert (own.evaluations / rows).read_text() == (arm.evaluations / rows).read_text()


class _Killed(KeyboardInterrupt):
    """Stands for a kill: nothing of ours may catch it."""


@pytest.mark.parametrize("when", [(1, 1), (2, 0), (3, 1)])
def test_killed_while_training_alone_and_resumed(federated, local_arm, tmp_path, when):
    site = fresh(federated[0].named("alpha"), tmp_path / "store")

    def stop(name: str, round_: int, step: int, loss: float) -> None:
        if (round_, step) == when:
            raise _Killed

    with pytest.raises(_Killed):
        train_alone(site, on_step=stop)
    assert not alone_model(site).exists()
    seen: list[tuple[str, int, int]] = []
    train_alone(site, on_step=lambda *step: seen.append(step[:3]))
    assert seen == [("alpha", r, s) for r in range(when[0], 4) for s in (0, 1)]
    assert_equal(last_local(alone_site(site)), last_local(local_arm.named("alpha")))
    assert len(list(alone_site(site).evaluations.glob("validation-*.csv"))) == 3


def test_killed_in_a_round_it_goes_on_from_the_last_kept_step(federated, local_arm, tmp_path):
    site = fresh(federated[0].named("alpha"), tmp_path / "store")
    resources = site.config.resources.model_copy(update={"checkpoint_steps": 1})
    config = site.config.model_copy(update={"resources": resources})
    site = dataclasses.replace(site, config=config)

    def stop(name: str, round_: int, step: int, loss: float) -> None:
        if (round_, step) == (2, 1):
            raise _Killed

    with pytest.raises(_Killed):
        train_alone(site, on_step=stop)
    seen: list[tuple[int, int]] = []
    train_alone(site, on_step=lambda _, round_, step, loss: seen.append((round_, step)))
    assert seen == [(2, 1), (3, 0), (3, 1)]
    assert_equal(last_local(alone_site(site)), last_local(local_arm.named("alpha")))


def test_a_finished_model_is_not_trained_again(results):
    def never(*_: object) -> None:
        raise AssertionError("trained again")

    assert train_alone(results[0], on_step=never) == alone_model(results[0])


def test_the_kept_model_is_the_last_rounds_with_the_sites_own_part(federated, results):
    site, state = results[0], federated[1]
    model = load_bundle(federated_model(site), "alpha")
    whole = model.network.state_dict()
    shared = unflatten(state.global_, state.schema)
    assert_equal({key: whole[key] for key in shared}, shared)
    # One domain: the stacked parameters have it as their only row.
    own = {k: v for k, v in last_local(site).items() if not k.startswith("optimizer/")}
    assert own
    for key, value in own.items():
        name, _, domain = key.partition("@")
        assert torch.equal(whole[name][0] if domain else whole[name], value)


def csv_dice(path: Path) -> dict[str, float]:
    with path.open(newline="") as lines:
        return {row["case"]: float(row["dice"]) for row in csv.DictReader(lines) if row["dice"]}


def test_results_are_those_of_the_rows_that_are_kept(results):
    site, found = results
    ours = csv_dice(site.evaluations / "test-round-000003.csv")
    theirs = csv_dice(alone_site(site).evaluations / "test-round-000003.csv")
    assert ours.keys() == theirs.keys() == {case.case for case in site.split("test")}
    assert len(ours) == 2
    expected = statistics.fmean(ours[case] - theirs[case] for case in ours)
    assert found.overall.difference.mean == pytest.approx(expected)
    assert found.overall.federated.mean == pytest.approx(statistics.fmean(ours.values()))
    assert {pair.case: pair.federated for pair in found.cases} == pytest.approx(ours)
    assert found.round == 3
    # With one class, the mean over classes is that class, its interval included.
    assert found.classes[0] == dataclasses.replace(found.overall, name="blob")


def test_the_coordinator_was_told_the_same_mean(federated, results):
    record = next(r for r in federated[1].records if r["site"] == "alpha" and r["split"] == "test")
    assert results[1].overall.federated.mean == pytest.approx(record["dice"])


def test_a_model_of_another_study_or_other_domains_is_refused(federated, results, tmp_path):
    site = results[0]
    other = site.with_study(tiny_study(seed=1))
    with pytest.raises(ConfigError, match="a model of study"):
        evaluate_site(other, federated_model(site))
    moved = dataclasses.replace(site, domains=("alpha", "new"))
    with pytest.raises(ConfigError, match="made with the domains alpha"):
        evaluate_site(moved, federated_model(site))
    alone_missing = fresh(site, tmp_path / "store")
    with pytest.raises(ConfigError, match="train it first"):
        evaluate_site(alone_missing, federated_model(site))


def test_a_damaged_round_of_the_local_only_model_is_not_skipped(federated, tmp_path):
    site = fresh(federated[0].named("alpha"), tmp_path / "store")

    def stop(name: str, round_: int, step: int, loss: float) -> None:
        if round_ == 3:
            raise _Killed

    with pytest.raises(_Killed):
        train_alone(site, on_step=stop)
    path = alone_site(site).store.folder / "round-000002" / "local.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        train_alone(site)


# --- the page ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(results, tmp_path_factory) -> str:
    site, found = results
    ledger = site.config.store / "ledger" / "ledger.jsonl"
    ledger.parent.mkdir(mode=0o700)
    ledger.write_text(
        '{"bytes": 1500000, "kind": "update", "study": "%s"}\n' % site.study.digest  # noqa: UP031
    )
    path = Path(tmp_path_factory.mktemp("page")) / "report.html"
    write_site_report(path, site, found)
    assert path.stat().st_mode & 0o777 == 0o600
    return path.read_text()


def test_the_page_says_what_was_found(page, results):
    site, found = results
    for pair in found.cases:
        assert pair.case in page
        assert f"{pair.federated:.3f}" in page
    for text in (
        site.study.digest,
        "It stays at the site",
        found.overall.word,
        f"{found.overall.federated.mean:.3f}",
        f"{found.overall.alone.mean:.3f}",
        "n&nbsp;=&nbsp;2",
        "1.5 MB",
        "1 message,",
        "With fewer than 6 patients",
    ):
        assert text in page, text
    assert page.count("data:image/png;base64,") == 4
    assert "None" not in page
    # Three rounds of validation under both models.
    assert page.count('<circle class="dot"') == 6


def test_the_page_loads_nothing_and_runs_nothing(page):
    assert not re.search(r"<script|<link|@import|javascript:|\son\w+=", page, re.IGNORECASE)
    assert re.findall(r"https?://\S+", page) == []
    sources = re.findall(r'(?:src|href)="([^"]{0,15})', page)
    assert sources
    assert all(source.startswith("data:image/png") for source in sources)
    assert "default-src 'none'" in page
    assert len(page) < 4 * 130_000 * 4 / 3 + 60_000


def test_names_cannot_write_into_the_page(results, tmp_path):
    site, found = results
    hostile = '<img src=x onerror="1">\u202e'
    pairs = tuple(dataclasses.replace(p, federated=0.5) for p in found.cases)
    overall = dataclasses.replace(found.overall, name=hostile)
    classes = (dataclasses.replace(found.classes[0], name=hostile),) * 2
    changed = dataclasses.replace(found, overall=overall, classes=classes, cases=pairs)
    write_site_report(tmp_path / "report.html", site, changed)
    text = (tmp_path / "report.html").read_text()
    assert "&lt;img src=x" in text
    assert "<img src=x" not in text
    assert "\u202e" not in text


def test_without_rows_ledger_or_cases_the_page_says_so(results, tmp_path):
    site, found = results
    bare = fresh(site, tmp_path / "store")
    nothing = dataclasses.replace(
        found,
        cases=(),
        overall=dataclasses.replace(
            found.overall,
            **{
                field: dataclasses.replace(
                    getattr(found.overall, field), mean=None, low=None, high=None, n=0
                )
                for field in ("federated", "alone", "difference")
            },
        ),
    )
    write_site_report(tmp_path / "report.html", bare, nothing)
    text = (tmp_path / "report.html").read_text()
    assert "This site keeps no ledger." in text
    assert "No case has a value under both models." in text
    assert "<svg" not in text
    assert "data:image/png" not in text
