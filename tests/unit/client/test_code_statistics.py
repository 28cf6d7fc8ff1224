"""What a site gives of its style codes: their numbers, their limits, and only once."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support import few_patients, wire
from tests.support.bench import bench_of
from tests.support.few_patients import write_cases
from uharmony_client.ledger import Ledger
from uharmony_client.ledger_check import show
from uharmony_client.outgoing import Outgoing
from uharmony_client.policy import Policy
from uharmony_client.site import Site
from uharmony_client.statistics import given_of, statistics_answer, without_own
from uharmony_model.alignment.style_autoencoder import AutoencoderSettings, build_autoencoder
from uharmony_model.alignment.style_codes import StyleCodes
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.combined import Combined, encode_combined
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, decode, encode
from uharmony_model.exchange.schema import unflatten
from uharmony_model.exchange.statistics import StatisticsForm
from uharmony_model.initial import initial_weights
from uharmony_model.networks import autoencoder_of, training_network

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OPEN = Policy(statistics=("codes",), min_cases=1)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(
        "uharmony_model.networks.build_autoencoder",
        partial(build_autoencoder, AutoencoderSettings(features=4, blocks=1)),
    )


study_of = partial(few_patients.study_of, style="codes")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("data") / "volumes")


def open_site(data, store, policy=OPEN, study=None, **options) -> Site:
    return few_patients.open_site(data, store, policy, study or study_of(), **options)


def ask(site: Site, *what, round_=2, ledger=None, weights=None):
    bench, form = bench_of(site, weights), StatisticsForm.of(site.study)
    # What training left in the network is not what codes are made with.
    with torch.no_grad():
        for parameter in autoencoder_of(bench.network).parameters():
            parameter.fill_(float("nan"))
    order = Instruction(
        action="train",
        study=site.study.digest,
        round=round_,
        base=bench.base,
        statistics=what or ("codes",),
    )
    out = Outgoing(ledger, site.config.policy)
    return statistics_answer(site, bench, order, form, out), form


@pytest.mark.parametrize("labels", ["all", "none"])
def test_codes_are_mean_and_deviation_over_patients(data, tmp_path, labels):
    """A patch as large as the volume shows all of it, so the draws do not matter."""
    site = open_site(data, tmp_path, labels=labels)
    answer, form = ask(site)
    schema = form.schema("codes")
    manifest, flat = decode(answer.payloads["codes"], kind=Kind.STATISTICS, schema=schema)
    assert (manifest.round, manifest.base, manifest.values) == (0, "", {"patients": 3})
    autoencoder = autoencoder_of(training_network(site.study, ("alpha",), seed=site.study.seed))
    by_patient: dict[str, list[np.ndarray]] = {}
    for case in site.split("train"):
        image = torch.from_numpy(np.array(site.volumes[case.case].image[0], dtype=np.float32))
        kept, first = 11, 2  # the middle four sixths of 16
        middle = [image[:, :, i][None, None] for i in range(first, first + kept)]
        code = torch.cat([autoencoder.encode_style(s) for s in middle]).mean(0).detach().numpy()
        by_patient.setdefault(case.patient, []).append(code)
    assert sorted(by_patient) == ["a", "b", "c", "d"]
    mean = np.mean([np.mean(found, axis=0) for found in by_patient.values()], axis=0)
    square = [np.mean((np.array(found) - mean) ** 2, axis=0) for found in by_patient.values()]
    tensors = unflatten(flat, schema)
    np.testing.assert_allclose(tensors["style_centroids"][0], mean, rtol=1e-3, atol=1e-5)
    wanted = np.sqrt(np.mean(square, axis=0))
    np.testing.assert_allclose(tensors["style_spread"][0], wanted, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "study", "wanted"),
    [
        (OPEN, {}, "given"),
        (Policy(), {}, "not_opted_in"),
        (Policy(statistics=("amplitude", "prototypes"), min_cases=1), {}, "not_opted_in"),
        (Policy(statistics=("codes",), min_cases=4), {}, "given"),
        (Policy(statistics=("codes",), min_cases=5), {}, "too_few_patients"),
        (Policy(statistics=("codes",)), {}, "too_few_patients"),
        (OPEN, {"min_patients": 5}, "too_few_patients"),
    ],
)
def test_a_policy_or_too_few_patients_keep_them_here(data, tmp_path, policy, study, wanted):
    answer, _ = ask(open_site(data, tmp_path, policy, study_of(**study)))
    assert json.loads(answer.text) == {"codes": wanted}
    assert list(answer.payloads) == (["codes"] if wanted == "given" else [])
    assert (tmp_path / "ledger").exists() == (wanted == "given")


def test_while_the_autoencoder_learns_none_are_given(data, tmp_path):
    answer, _ = ask(open_site(data, tmp_path), round_=1)
    assert json.loads(answer.text) == {"codes": "not_usable"}
    assert not (tmp_path / "ledger").exists()


def test_asked_again_they_are_the_same_bytes(data, tmp_path):
    site = open_site(data, tmp_path)
    first, _ = ask(site)
    other = initial_weights(site.study)[1] * 1.5
    assert ask(site, round_=3, weights=other)[0].payloads == first.payloads
    anew, _ = ask(open_site(data, tmp_path / "other"), round_=3, weights=other)
    assert anew.payloads != first.payloads


def test_codes_stand_in_the_ledger(data, tmp_path):
    ledger = Ledger(tmp_path / "book", KEY)
    ask(open_site(data, tmp_path), ledger=ledger)
    sent, said = show(ledger.folder)
    assert (sent.kind, sent.values) == ("statistics", {"patients": 3})
    assert [t.name for t in sent.tensors] == ["style_centroids", "style_spread"]
    assert json.loads(said.text or "") == {"codes": "given"}


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        (Policy(statistics=("amplitude",), min_cases=1), {}),
        (OPEN, {"values": {"patients": 1}}),
        (OPEN, {"values": {"patients": 3, "cases": 5}}),
        (OPEN, {"flat": torch.full((16,), -1.0)}),
        (OPEN, {"flat": torch.full((16,), float("nan"))}),
    ],
)
def test_codes_that_are_not_what_they_say_do_not_leave(policy, changes):
    schema = StatisticsForm(None, None, (1, 8)).schema("codes")
    fields = {"values": {"patients": 3}, "flat": torch.full((16,), 0.5), **changes}
    data = encode(
        kind=Kind.STATISTICS, study=wire.STUDY, round=0, site="alpha", schema=schema, **fields
    )
    with pytest.raises(ExchangeError):
        Outgoing(None, policy).payload(data, schema)
    good = encode(
        kind=Kind.STATISTICS,
        study=wire.STUDY,
        round=0,
        site="alpha",
        schema=schema,
        **{**fields, "values": {"patients": 3}, "flat": torch.full((16,), 0.5)},
    )
    assert Outgoing(None, OPEN).payload(good, schema) == good


def test_what_a_site_receives_is_without_its_own(data, tmp_path):
    site = open_site(data, tmp_path)
    answer, form = ask(site)
    schema = form.schema("codes")
    own = unflatten(
        decode(answer.payloads["codes"], kind=Kind.STATISTICS, schema=schema)[1], schema
    )
    mine = StyleCodes(own["style_centroids"].numpy(), own["style_spread"].numpy())
    other = StyleCodes(np.ones((1, 8)), np.ones((1, 8)))
    sent = encode_combined(
        Combined((), None, (mine, other)),
        form,
        study=site.study.digest,
        round_=2,
        base=wire.BASE,
    )
    order = Instruction(
        action="train",
        study=site.study.digest,
        round=3,
        base=wire.BASE,
        given=sha256(sent).hexdigest(),
    )
    given = given_of(sent, order, site.study, form)
    assert len(given.codes) == 2
    (left,) = without_own(given, site, form).codes
    np.testing.assert_array_equal(left.centroids, other.centroids)
    elsewhere = open_site(data, tmp_path / "other")
    assert len(without_own(given, elsewhere, form).codes) == 2
    assert without_own(replace(given, codes=()), site, form).codes == ()
    (path,) = (tmp_path / "ledger" / "releases").rglob("codes.bin")
    path.write_bytes(path.read_bytes()[:-1])
    assert len(without_own(given, site, form).codes) == 2  # and the round goes on
