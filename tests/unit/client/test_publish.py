"""What a site publishes: who may, from how many patients, through the gate, and once."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support import wire
from tests.support.bench import bench_of
from tests.support.tiny import tiny_study, write_folder
from uharmony_client import publish as module
from uharmony_client.ledger import Ledger
from uharmony_client.ledger_check import show, verify
from uharmony_client.local_store import RoundKey
from uharmony_client.outgoing import Outgoing
from uharmony_client.policy import Policy, publication_view
from uharmony_client.publish import domain_reasons, patients_by_domain, publish
from uharmony_client.releases import Releases
from uharmony_client.site import Site
from uharmony_client.site_config import SiteConfig
from uharmony_client.site_round import Bench, round_update
from uharmony_client.workbench import carried_after
from uharmony_model.errors import ExchangeError, StoreError
from uharmony_model.exchange.payload import Kind, decode, digest, encode, open_payload
from uharmony_model.exchange.published import PublicationForm, Reason
from uharmony_model.exchange.schema import Schema, unflatten
from uharmony_model.exchange_settings import Publication
from uharmony_model.initial import initial_local
from uharmony_model.prototypes import noise_deviation, release_prototype
from uharmony_model.study import Study

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
BOTH = Policy(publish=("experts", "prototypes"), min_cases=1)
PUBLISHED, FEW, TELLS = Reason.PUBLISHED, Reason.TOO_FEW_PATIENTS, Reason.TELLS_OF_ANOTHER
SCHEMA = Schema.of({"a@north": torch.zeros(2, 2), "b@north": torch.zeros(1)})
ROWS = Schema.of({"prototype@north": torch.zeros(8)})


# --- which domains --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patients", "policy", "settings", "wanted"),
    [
        ({"a": 10}, BOTH, {}, [PUBLISHED]),
        ({"a": 9}, BOTH, {}, [FEW]),
        ({"a": 0}, BOTH, {}, [FEW]),
        ({"a": 19, "b": 20}, BOTH, {"min_patients": 20}, [FEW, PUBLISHED]),
        # The site's own threshold counts too, and a total less the others must tell nothing.
        ({"a": 10}, Policy(), {}, [FEW]),
        ({"a": 11}, Policy(), {}, [PUBLISHED]),
        ({"a": 30, "b": 5}, Policy(), {}, [TELLS, FEW]),
        ({"a": 30, "b": 5, "c": 20}, Policy(), {}, [PUBLISHED, FEW, TELLS]),
        ({"a": 30, "b": 5, "c": 4}, Policy(), {}, [PUBLISHED, FEW, FEW]),
        ({"a": 30, "b": 5}, BOTH, {}, [PUBLISHED, FEW]),
        ({"a": 50}, BOTH, {"delta": 0.02}, [Reason.TOO_MANY_PATIENTS]),
        ({"a": 49}, BOTH, {"delta": 0.02}, [PUBLISHED]),
        ({"d" * 60: 10}, BOTH, {}, [Reason.NAME_TOO_LONG]),
    ],
)
def test_the_reason_of_each_domain(patients, policy, settings, wanted):
    found = domain_reasons("north", patients, "prototypes", Publication(**settings), policy)
    assert list(found.values()) == wanted


def test_delta_does_not_bind_experts():
    found = domain_reasons("north", {"a": 50}, "experts", Publication(delta=0.02), BOTH)
    assert found == {"a": PUBLISHED}


# --- the gate -------------------------------------------------------------------------------------


def sent(kind: Kind = Kind.EXPERT, **changes) -> bytes:
    noisy = kind is Kind.PROTOTYPE
    schema = changes.get("schema", ROWS if noisy else SCHEMA)
    values = {"patients/north": 12} | ({"epsilon": 1.0, "delta": 1e-5} if noisy else {})
    fields = {
        "study": wire.STUDY,
        "round": 5,
        "site": "north",
        "base": wire.BASE,
        "schema": schema,
        "flat": torch.linspace(-1, 1, schema.numel),
        "values": values,
    }
    return encode(kind=kind, **{**fields, **changes})


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "ledger", KEY)


def test_a_release_leaves_as_the_ledger_says(ledger):
    gate = Outgoing(ledger, BOTH)
    for kind, schema in ((Kind.EXPERT, SCHEMA), (Kind.PROTOTYPE, ROWS)):
        data = sent(kind)
        assert gate.payload(data, schema) is data
    assert verify(ledger.folder, KEY.public_key()).problems == ()
    expert, prototype = show(ledger.folder)
    assert (expert.kind, prototype.kind) == ("expert", "prototype")
    assert expert.values == {"patients/north": 12}
    assert prototype.values == {"patients/north": 12, "epsilon": 1.0, "delta": 1e-5}
    assert [t.name for t in expert.tensors] == ["a@north", "b@north"]
    assert [t.name for t in prototype.tensors] == ["prototype@north"]


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        (Kind.EXPERT, Policy()),
        (Kind.PROTOTYPE, Policy()),
        (Kind.EXPERT, Policy(publish=("prototypes",))),
        (Kind.PROTOTYPE, Policy(publish=("experts",))),
    ],
)
def test_what_the_site_did_not_opt_in_to_does_not_leave(ledger, kind, policy):
    schema = SCHEMA if kind is Kind.EXPERT else ROWS
    with pytest.raises(ExchangeError, match=r"policy\.publish does not name them"):
        Outgoing(ledger, policy).payload(sent(kind), schema)
    assert list(show(ledger.folder)) == []


WIDE = Schema.of({"prototype@north": torch.zeros(17)})
OTHER = Schema.of({"phi@north": torch.zeros(8)})
ELSEWHERE = Schema.of({"a@north": torch.zeros(2), "a@south": torch.zeros(2)})
SHARED = Schema.of({"a@north": torch.zeros(2), "weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("data", "schema"),
    [
        (sent(values={"patients/north": 9}), SCHEMA),
        (sent(values={"patients/north": "<11"}), SCHEMA),
        (sent(values={}), SCHEMA),
        (sent(values={"patients/north": 12, "cases": 12}), SCHEMA),
        (sent(values={"patients/north": 12, "patients/south": 12}), SCHEMA),
        (sent(schema=ELSEWHERE), ELSEWHERE),
        (sent(schema=SHARED), SHARED),
        (sent(flat=torch.full((5,), math.nan)), SCHEMA),
        (sent(flat=torch.full((5,), math.inf)), SCHEMA),
        (sent(), None),
        (sent(Kind.PROTOTYPE, values={"patients/north": 12}), ROWS),
        (
            sent(Kind.PROTOTYPE, values={"patients/north": 12, "epsilon": 1.5, "delta": 1e-5}),
            ROWS,
        ),
        (sent(Kind.PROTOTYPE, values={"patients/north": 12, "epsilon": 1.0, "delta": 0.1}), ROWS),
        (
            sent(Kind.PROTOTYPE, values={"patients/north": 12, "epsilon": 1.0, "delta": None}),
            ROWS,
        ),
        (sent(Kind.PROTOTYPE, schema=WIDE), WIDE),
        (sent(Kind.PROTOTYPE, schema=OTHER), OTHER),
    ],
)
def test_a_release_that_is_not_what_it_says_does_not_leave(ledger, data, schema):
    with pytest.raises(ExchangeError):
        Outgoing(ledger, BOTH).payload(data, schema)
    assert list(show(ledger.folder)) == []


def test_the_sites_own_threshold_holds_at_the_gate_too(ledger):
    strict = Policy(publish=("experts",), min_cases=13)
    with pytest.raises(ExchangeError, match="12 patients"):
        Outgoing(ledger, strict).payload(sent(), SCHEMA)


def test_the_policy_is_shown_in_words():
    study = study_of()
    assert publication_view(Policy(), tiny_study()) == "nothing, the study does not ask for it"
    assert "no experts" in publication_view(Policy(), study)
    shown = publication_view(Policy(publish=("experts", "prototypes")), study)
    assert "experts of domains with 11 patients or more, without any privacy claim" in shown
    assert "epsilon 1, delta 1e-05" in shown


# --- kept -----------------------------------------------------------------------------------------


def test_a_release_is_kept_once(tmp_path):
    kept = Releases(tmp_path, wire.STUDY)
    assert kept.get("experts", max_bytes=1 << 21) is None
    kept.keep("experts", sent())
    found = kept.get("experts", max_bytes=1 << 21)
    assert found is not None
    assert found[0] == sent()
    with pytest.raises(StoreError, match="one release"):
        kept.keep("experts", sent())
    assert kept.get("prototypes", max_bytes=1 << 21) is None


@pytest.mark.parametrize("harm", ["shorter", "longer", "flipped", "another study"])
def test_a_damaged_release_is_never_made_anew(tmp_path, harm):
    data = sent(study="0" * 64) if harm == "another study" else sent()
    Releases(tmp_path, wire.STUDY).keep("experts", data)
    (path,) = tmp_path.glob("ledger/releases/*/experts.bin")
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    path.write_bytes(
        {"shorter": data[:-1], "longer": data + b" ", "flipped": flipped}.get(harm, data)
    )
    with pytest.raises(StoreError):
        Releases(tmp_path, wire.STUDY).get("experts", max_bytes=1 << 21)


# --- a site ---------------------------------------------------------------------------------------


def study_of(**publication) -> Study:
    return tiny_study(
        training={"rounds": 1, "local_steps": 1, "batch_size": 1, "patch": [8, 8, 8]},
        network={"harmonization": {"domain_dropout": 0.0}},  # else the one step may be without
        evaluation={"validation": 0.0, "test": 0.0, "every": 0},
        publication={
            "experts": True,
            "prototypes": True,
            "center": [0.5],
            "scale": [4.0],
            **publication,
        },
    )


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> tuple[Site, Bench]:
    """Ten patients and twelve cases, two of them second scans; one round done."""
    root = tmp_path_factory.mktemp("north")
    folder = write_folder(root / "data", {"north": 12}, size=8)
    with (folder / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for second, first in ((10, 0), (11, 1)):
        rows[second]["patient"] = rows[first]["patient"]
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    config = SiteConfig(name="north", cases=folder, store=root / "store", policy=BOTH)
    site = Site.open(config, study_of())
    bench = bench_of(site)
    round_update(site, bench, 1)
    return site, bench


def fresh(site: Site, tmp_path: Path, **changes) -> Site:
    """The same site with nothing published so far."""
    config = site.config.model_copy(update={"store": tmp_path, **changes})
    return dataclasses.replace(site, config=config)


def test_patients_are_counted_and_not_cases(opened):
    site, _ = opened
    assert len(site.split("train")) == 12
    assert patients_by_domain(site) == {"north": 10}


def test_experts_are_what_the_site_carries_and_nothing_else(opened, tmp_path):
    site, bench = opened
    answer = publish(fresh(site, tmp_path), bench)
    expert = next(r for r in answer.releases if r.what == "experts")
    manifest, flat = decode(expert.data, kind=Kind.EXPERT, schema=expert.schema)
    assert (manifest.round, manifest.site, manifest.base) == (3, "north", bench.base)
    assert manifest.values == {"patients/north": 10}
    carried = site.store.before(site.study.digest, 2)
    assert carried is not None
    found = unflatten(flat, expert.schema)
    assert found.keys() == {key for key in carried if not key.startswith("optimizer/")}
    assert all(torch.equal(found[key], carried[key]) for key in found)
    assert any(bool(tensor.any()) for tensor in found.values())


def test_a_prototype_is_the_mean_over_patients_and_its_noise(opened, tmp_path, monkeypatch):
    """Against the statistics of the first convolution, case by case, and noise that is known."""
    site, bench = opened
    noise = []

    def silent(domain, rows, **budget):
        def gauss(mean: float, sigma: float) -> float:
            noise.append(sigma)
            return 0.0

        return release_prototype(domain, rows, gauss=gauss, **budget)

    monkeypatch.setattr(module, "release_prototype", silent)
    answer = publish(fresh(site, tmp_path), bench)
    release = next(r for r in answer.releases if r.what == "prototypes")
    _, flat = decode(release.data, kind=Kind.PROTOTYPE, schema=release.schema)

    shared = bench.shared
    weight = next(v for k, v in shared.items() if v.ndim == 5 and v.shape[:2] == (4, 1))
    (name,) = [k for k, v in shared.items() if v is weight]
    bias = shared[name.removesuffix("weight") + "bias"]
    patients: dict[str, list[np.ndarray]] = {}
    for case in site.split("train"):
        image = torch.from_numpy(np.array(site.volumes[case.case].image))[None]
        stride = 2 if "model.0.conv" in name else 1
        made = torch.nn.functional.conv3d(image, weight, bias, stride=stride, padding=1)[0]
        made = made.double().flatten(1)
        row = torch.cat((made.mean(1), 0.5 * (made.var(1, unbiased=False) + 1e-5).log()))
        patients.setdefault(case.patient, []).append(row.numpy())
    assert len(patients) == 10
    rows = np.stack([np.mean(of_one, axis=0) for of_one in patients.values()])
    scaled = (rows - 0.5) / 4.0 / math.sqrt(8)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    expected = (scaled / np.maximum(lengths, 1)).mean(0)

    sigma = noise_deviation(10, epsilon=1.0, delta=1e-5)
    assert noise == [sigma] * 8
    assert np.allclose(flat.double().numpy(), expected, atol=sigma / 512)


def test_asked_again_it_sends_the_same_bytes_and_draws_no_noise(opened, tmp_path, monkeypatch):
    site, bench = opened
    here = fresh(site, tmp_path)
    first = publish(here, bench)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("noise was drawn a second time")

    monkeypatch.setattr(module, "release_prototype", never)
    again = publish(here, bench)
    assert [r.data for r in again.releases] == [r.data for r in first.releases]
    assert len(first.releases) == 2
    for release in again.releases:
        assert Outgoing(None, BOTH).payload(release.data, release.schema) is release.data


def test_it_is_on_disk_before_it_is_handed_on(opened, tmp_path, monkeypatch):
    site, bench = opened

    def full(self: Releases, what: str, data: bytes) -> None:
        raise StoreError("disk full")

    monkeypatch.setattr(Releases, "keep", full)
    with pytest.raises(StoreError, match="disk full"):
        publish(fresh(site, tmp_path), bench)


def test_from_other_weights_there_is_no_second_release(opened, tmp_path):
    site, bench = opened
    here = fresh(site, tmp_path)
    publish(here, bench)
    other = Bench(bench.network, bench.partition, bench.weights + 1, digest(bench.weights + 1))
    with pytest.raises(ExchangeError, match="one release"):
        publish(here, other)


def test_who_opts_out_later_sends_nothing_more(opened, tmp_path):
    site, bench = opened
    publish(fresh(site, tmp_path), bench)
    answer = publish(fresh(site, tmp_path, policy=Policy(min_cases=1)), bench)
    assert answer.releases == ()
    assert set(answer.said.values()) == {(Reason.NOT_OPTED_IN,)}


def test_who_does_not_draw_every_class_publishes_no_expert(opened, tmp_path, monkeypatch):
    site, bench = opened
    monkeypatch.setattr(SiteConfig, "annotates", lambda config, task: (False,))
    answer = publish(fresh(site, tmp_path), bench)
    assert [release.what for release in answer.releases] == ["prototypes"]
    assert answer.said["experts"] == (Reason.UNDRAWN_CLASSES,)


def test_who_never_trained_has_nothing_to_publish(opened, tmp_path):
    site, bench = opened
    newcomer = fresh(site, tmp_path).with_study(site.study)
    answer = publish(newcomer, bench)
    assert answer.releases == ()
    assert set(answer.said.values()) == {(Reason.NOT_TRAINED,)}


def test_who_came_for_the_finale_alone_never_trained(opened, tmp_path):
    """Its only generation is that of the round after the last."""
    site, bench = opened
    newcomer = fresh(site, tmp_path).with_study(site.study)
    last = site.study.training.rounds
    newcomer.store.write(RoundKey(site.study.digest, last + 1, bench.base), b"finale", {})
    answer = publish(newcomer, bench)
    assert answer.releases == ()
    assert set(answer.said.values()) == {(Reason.NOT_TRAINED,)}
    carried = carried_after(newcomer, last)
    assert carried.keys() == initial_local(site.study, site.domains).keys()
    assert not any(bool(tensor.any()) for tensor in carried.values())


def test_the_noise_is_not_the_studys(opened, tmp_path):
    """Whoever knows the seed could take such noise off again."""
    site, bench = opened
    bodies = set()
    for name in ("one", "two"):
        answer = publish(fresh(site, tmp_path / name), bench)
        data = next(r.data for r in answer.releases if r.what == "prototypes")
        bodies.add(bytes(open_payload(data, max_bytes=1 << 21).body))
    assert len(bodies) == 2


def test_the_form_is_that_of_the_study(opened, tmp_path):
    site, bench = opened
    form = PublicationForm.of(site.study)
    for release in publish(fresh(site, tmp_path), bench).releases:
        assert release.schema == form.schema(release.what, ("north",))
