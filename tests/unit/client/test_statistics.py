"""What a site gives for others to learn with: its numbers, its limits, and only once."""

from __future__ import annotations

import dataclasses
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support import few_patients, wire
from tests.support.bench import bench_of
from tests.support.few_patients import SIZE, study_of, write_cases
from tests.support.tiny import tiny_study
from uharmony_client import statistic_measures as module
from uharmony_client.approval import require_approved
from uharmony_client.ledger import Ledger
from uharmony_client.ledger_check import show
from uharmony_client.outgoing import Outgoing
from uharmony_client.policy import Policy, least_patients, statistics_view
from uharmony_client.releases import Releases
from uharmony_client.site import Site
from uharmony_client.statistics import Answer, given_of, statistics_answer
from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.errors import ExchangeError, PayloadError, StoreError
from uharmony_model.exchange.combined import Combined, encode_combined
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, decode, digest, encode
from uharmony_model.exchange.schema import Schema, unflatten
from uharmony_model.exchange.statistics import StatisticsForm
from uharmony_model.features import deepest_features
from uharmony_model.initial import initial_weights
from uharmony_model.networks import build_network
from uharmony_model.study import Study

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
BOTH = Policy(statistics=("amplitude", "prototypes"), min_cases=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("data") / "volumes")


def open_site(data, store, policy=BOTH, study=None, **options) -> Site:
    return few_patients.open_site(data, store, policy, study or study_of(), **options)


def ask(site: Site, *what, round_=1, ledger=None) -> tuple[Answer, StatisticsForm]:
    bench, form = bench_of(site), StatisticsForm.of(site.study)
    order = Instruction(
        action="train",
        study=site.study.digest,
        round=round_,
        base=bench.base,
        statistics=what or ("amplitude", "prototypes"),
    )
    out = Outgoing(ledger, site.config.policy)
    return statistics_answer(site, bench, order, form, out), form


# --- what is given --------------------------------------------------------------------------------


def test_a_style_is_the_mean_over_patients_of_the_means_over_their_cases(data, tmp_path):
    """A patch as large as the volume shows all of it, so the draws do not matter."""
    site = open_site(data, tmp_path)
    answer, form = ask(site, "amplitude")
    manifest, flat = decode(
        answer.payloads["amplitude"], kind=Kind.STATISTICS, schema=form.schema("amplitude")
    )
    assert (manifest.round, manifest.base, manifest.values) == (0, "", {"patients": 3})
    by_patient: dict[str, list[np.ndarray]] = {}
    for case in site.split("train"):
        shown = np.array(site.volumes[case.case].image[0], dtype=np.float64) + 4  # the floor is -4
        spectrum = np.fft.fftshift(np.abs(np.fft.fftn(shown))) / shown.size
        middle = SIZE // 2
        box = spectrum[(slice(middle - 1, middle + 2),) * 3]
        by_patient.setdefault(case.patient, []).append(box)
    assert len(by_patient) == 4
    wanted = np.mean([np.mean(of_one, axis=0) for of_one in by_patient.values()], axis=0)
    np.testing.assert_allclose(flat.reshape(3, 3, 3).numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_prototypes_are_those_of_the_rounds_weights(data, tmp_path):
    site = open_site(data, tmp_path)
    answer, form = ask(site, "prototypes", round_=2)
    schema = form.schema("prototypes")
    manifest, flat = decode(answer.payloads["prototypes"], kind=Kind.STATISTICS, schema=schema)
    assert (manifest.round, manifest.values) == (2, {"patients": 3})
    assert manifest.base == digest(initial_weights(site.study)[1])
    found = unflatten(flat, schema)
    network = build_network(site.study, ("alpha",), seed=site.study.seed).eval()
    of_class: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for case in site.split("train"):
        volume = site.volumes[case.case]
        with torch.no_grad(), deepest_features(network) as seen:
            network(torch.from_numpy(np.array(volume.image))[None], torch.zeros(1).long())
        features = seen.features[0].double().numpy()
        step = SIZE // features.shape[-1]
        assert volume.label is not None
        label = np.array(volume.label)[(slice(step // 2, None, step),) * 3]
        for value, rows in of_class.items():
            rows.append(features[:, label == value].T)
    for value, rows in of_class.items():
        every = np.concatenate(rows)
        assert found["present"][value] == 1  # of how many voxels is not said
        np.testing.assert_allclose(found["mean"][value], every.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["variance"][value], every.var(0), rtol=1e-3, atol=1e-5)


def test_asked_again_a_style_is_the_same_bytes_even_of_other_patients(data, tmp_path, monkeypatch):
    first, _ = ask(open_site(data, tmp_path), "amplitude")
    monkeypatch.setattr(module, "STYLE_PATCHES", 1)
    site = open_site(data, tmp_path)
    gone = site.table.model_copy(update={"cases": site.table.cases[:-1]})
    again, _ = ask(dataclasses.replace(site, table=gone), "amplitude", round_=3)
    assert again.payloads == first.payloads
    anew, _ = ask(dataclasses.replace(open_site(data, tmp_path / "other"), table=gone), "amplitude")
    assert anew.payloads != first.payloads


def test_prototypes_are_the_same_for_the_same_weights(data, tmp_path):
    first, _ = ask(open_site(data, tmp_path), "prototypes")
    again, _ = ask(open_site(data, tmp_path), "prototypes")
    assert first.payloads == again.payloads
    assert list(first.payloads) == ["prototypes"]


def test_cases_without_labels_give_a_style_and_no_prototypes(data, tmp_path):
    answer, _ = ask(open_site(data, tmp_path, labels="none"))
    assert json.loads(answer.text) == {"amplitude": "given", "prototypes": "too_few_patients"}
    assert list(answer.payloads) == ["amplitude"]


# --- who gives nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (BOTH, ["given", "given"]),
        (Policy(), ["not_opted_in", "not_opted_in"]),
        (Policy(statistics=("prototypes",), min_cases=1), ["not_opted_in", "given"]),
        # Four patients: the site's own threshold counts too.
        (Policy(statistics=BOTH.statistics, min_cases=4), ["given", "given"]),
        (Policy(statistics=BOTH.statistics, min_cases=5), ["too_few_patients"] * 2),
        (Policy(statistics=BOTH.statistics), ["too_few_patients"] * 2),
    ],
)
def test_the_code_of_each(data, tmp_path, policy, wanted):
    answer, _ = ask(open_site(data, tmp_path, policy))
    assert json.loads(answer.text) == dict(zip(("amplitude", "prototypes"), wanted, strict=True))
    given = [what for what, said in json.loads(answer.text).items() if said == "given"]
    assert list(answer.payloads) == given


def test_too_few_patients_of_the_study(data, tmp_path):
    answer, _ = ask(open_site(data, tmp_path, study=study_of(min_patients=5)))
    assert set(json.loads(answer.text).values()) == {"too_few_patients"}
    assert not answer.payloads
    assert not (tmp_path / "ledger").exists()


def test_a_policy_that_was_tightened_keeps_back_what_was_made_before(data, tmp_path):
    ask(open_site(data, tmp_path), "amplitude")
    strict = Policy(statistics=("amplitude",), min_cases=4)
    answer, _ = ask(open_site(data, tmp_path, strict), "amplitude")
    assert json.loads(answer.text) == {"amplitude": "too_few_patients"}


def test_a_damaged_style_is_not_made_anew_and_stops_nothing(data, tmp_path):
    site = open_site(data, tmp_path)
    ask(site, "amplitude")
    (path,) = tmp_path.glob("ledger/releases/*/amplitude.bin")
    path.write_bytes(path.read_bytes()[:-1])
    answer, _ = ask(site)
    assert json.loads(answer.text) == {"amplitude": "damaged", "prototypes": "given"}


def test_an_image_that_is_out_of_bounds_gives_no_style(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "style_floor", lambda task: -99.0)
    answer, _ = ask(open_site(data, tmp_path), "amplitude")
    assert json.loads(answer.text) == {"amplitude": "not_usable"}
    assert not (tmp_path / "ledger").exists()


def test_a_full_disk_is_no_answer(data, tmp_path, monkeypatch):
    def full(self, what, data):
        raise StoreError("full") from OSError(28, "no space")

    monkeypatch.setattr(Releases, "keep", full)
    with pytest.raises(StoreError, match="full"):
        ask(open_site(data, tmp_path), "amplitude")


# --- the gate -------------------------------------------------------------------------------------

STYLES = StatisticsForm((1, 1), (2, 3)).schema("amplitude")
TABLES = StatisticsForm((1, 1), (2, 3)).schema("prototypes")


def sent(schema: Schema = STYLES, **changes) -> bytes:
    numbers = torch.full((27,), 0.5) if schema is STYLES else torch.zeros(schema.numel)
    fields = {"values": {"patients": 11}, "flat": numbers, "schema": schema}
    return encode(
        kind=Kind.STATISTICS, study=wire.STUDY, round=0, site="alpha", **{**fields, **changes}
    )


def test_a_statistic_leaves_as_the_ledger_says(tmp_path):
    ledger = Ledger(tmp_path / "ledger", KEY)
    gate = Outgoing(ledger, Policy(statistics=("amplitude", "prototypes")))
    assert gate.payload(sent(), STYLES) == sent()
    assert gate.payload(sent(TABLES), TABLES) == sent(TABLES)
    style, tables = show(ledger.folder)
    assert (style.kind, style.values) == ("statistics", {"patients": 11})
    assert [t.name for t in style.tensors] == ["amplitude"]
    assert [t.name for t in tables.tensors] == ["mean", "present", "variance"]


def test_an_answer_stands_in_the_ledger_with_its_codes(data, tmp_path):
    ledger = Ledger(tmp_path / "book", KEY)
    ask(open_site(data, tmp_path), ledger=ledger)
    entries = list(show(ledger.folder))
    assert [entry.kind for entry in entries] == ["statistics", "statistics", "statistics"]
    assert json.loads(entries[-1].text or "") == {"amplitude": "given", "prototypes": "given"}


OPEN = Policy(statistics=("amplitude",))


@pytest.mark.parametrize(
    ("policy", "data", "schema"),
    [
        (Policy(), sent(), STYLES),
        (OPEN, sent(TABLES), TABLES),
        (OPEN, sent(), None),
        (OPEN, sent(values={"patients": 10}), STYLES),
        (Policy(statistics=("amplitude",), min_cases=1), sent(values={"patients": 1}), STYLES),
        (OPEN, sent(values={"patients": 11, "cases": 12}), STYLES),
        (OPEN, sent(values={}), STYLES),
        (OPEN, sent(flat=torch.full((27,), 99.0)), STYLES),
        (OPEN, sent(flat=torch.linspace(0, 1, 27)), STYLES),
        (OPEN, sent(Schema.of({"w": torch.zeros(27)})), Schema.of({"w": torch.zeros(27)})),
    ],
)
def test_a_statistic_that_is_not_what_it_says_does_not_leave(tmp_path, policy, data, schema):
    ledger = Ledger(tmp_path / "ledger", KEY)
    with pytest.raises(ExchangeError):
        Outgoing(ledger, policy).payload(data, schema)
    assert list(show(ledger.folder)) == []


def test_the_policy_is_shown_in_words():
    assert statistics_view(BOTH, tiny_study()) == "nothing, the study does not ask for it"
    alone = tiny_study(method="local", unlabelled={"rule": "glua"})
    assert statistics_view(BOTH, alone) == "nothing, the study does not ask for it"
    shown = statistics_view(Policy(statistics=("amplitude",)), study_of())
    assert shown.startswith("a mean style of 11 training patients or more, 27 numbers, once, ")
    assert shown.endswith("no prototypes, policy.statistics does not name them")


def test_the_least_number_is_the_larger_of_both():
    assert least_patients(Policy(min_cases=1), study_of()) == 3
    assert least_patients(Policy(), study_of()) == 11


# --- what is received -----------------------------------------------------------------------------

FORM = StatisticsForm((1, 1), (2, 3))
STYLE = torch.full((1, 3, 3, 3), 0.5)
COMBINED = Combined((STYLE,), Prototypes(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2)))


def handed_out(study: Study, **changes) -> bytes:
    fields = {"round_": 1, "base": wire.BASE, **changes}
    return encode_combined(COMBINED, FORM, study=study.digest, **fields)


def order_for(study: Study, data: bytes | None, **changes) -> Instruction:
    named = "" if data is None else sha256(data).hexdigest()
    fields = {"round": 2, "base": wire.BASE, "given": named, **changes}
    return Instruction(action="train", study=study.digest, **fields)


def test_what_is_given_is_what_the_instruction_names():
    study = study_of()
    data = handed_out(study)
    given = given_of(data, order_for(study, data), study, FORM)
    assert len(given.styles) == 1
    assert torch.equal(given.styles[0], STYLE)
    assert given.prototypes is not None
    assert given.prototypes.voxels.tolist() == [1.0, 1.0]
    nothing = given_of(None, order_for(study, None), study, FORM)
    assert (nothing.styles, nothing.prototypes) == ((), None)


def test_anything_else_is_refused():
    study = study_of()
    data, other = handed_out(study), handed_out(study, base="c" * 64)
    foreign = handed_out(tiny_study(name="other"))
    for payload, order in (
        (None, order_for(study, data)),
        (data, order_for(study, None)),
        (other, order_for(study, data)),
        (other, order_for(study, other)),
        (data, order_for(study, data, round=3)),
        (foreign, order_for(study, foreign)),
    ):
        with pytest.raises(ExchangeError, match="send both anew"):
            given_of(payload, order, study, FORM)
    with pytest.raises(PayloadError):
        given_of(b"no", order_for(study, b"no"), study, FORM)


@pytest.mark.parametrize(
    ("method", "changes", "allowed"),
    [
        ("glua-fed", {"statistics": ("amplitude", "prototypes"), "given": wire.BASE}, True),
        ("ust-run-fed", {"statistics": ("amplitude",)}, True),
        ("ust-run-fed", {"statistics": ("prototypes",)}, False),
        ("ust-run-fed", {"statistics": ("amplitude", "amplitude")}, False),
        ("fedavg", {"statistics": ("amplitude",)}, False),
        ("fedavg", {"given": wire.BASE}, False),
        ("glua-fed", {"statistics": ("amplitude",), "action": "finale"}, False),
        ("glua-fed", {"given": wire.BASE, "action": "finale"}, False),
    ],
)
def test_only_what_the_study_names_is_approved(method, changes, allowed):
    study = tiny_study(method=method, finale={"steps": 1})
    action = changes.pop("action", "train")
    round_ = 4 if action == "finale" else 1
    order = Instruction(action=action, study=study.digest, round=round_, base=wire.BASE, **changes)
    if allowed:
        require_approved(order, study)
    else:
        with pytest.raises(ExchangeError, match="approved"):
            require_approved(order, study)
