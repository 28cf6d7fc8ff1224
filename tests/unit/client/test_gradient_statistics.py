"""What a site gives of the discriminator's gradient: its numbers, its side, its limits."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from tests.support import few_patients
from tests.support.bench import bench_of
from tests.support.few_patients import write_cases
from uharmony_client.learning import Given
from uharmony_client.ledger import Ledger
from uharmony_client.ledger_check import show
from uharmony_client.outgoing import Outgoing
from uharmony_client.policy import Policy
from uharmony_client.site import Site
from uharmony_client.statistics import statistics_answer
from uharmony_model.alignment.discriminator import FeatureDiscriminator
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, decode
from uharmony_model.exchange.schema import unflatten
from uharmony_model.exchange.statistics import StatisticsForm
from uharmony_model.features import deepest_features
from uharmony_model.networks import training_network

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OPEN = Policy(statistics=("discriminator",), min_cases=1)
study_of = partial(few_patients.study_of, align="discriminator")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("data") / "volumes")


def open_site(data, store, policy=OPEN, study=None, **options) -> Site:
    return few_patients.open_site(data, store, policy, study or study_of(), **options)


def ask(site: Site, given: Given | None = None, ledger=None):
    bench, form = bench_of(site), StatisticsForm.of(site.study)
    order = Instruction(
        action="train",
        study=site.study.digest,
        round=1,
        base=bench.base,
        statistics=("discriminator",),
    )
    out = Outgoing(ledger, site.config.policy)
    return statistics_answer(site, bench, order, form, out, given or Given()), form


def wanted(site: Site, discriminator: FeatureDiscriminator, *, target: bool) -> dict[str, Tensor]:
    """The gradient of one loss over all patients; a patch as large as a volume shows all of it."""
    network = training_network(site.study, ("alpha",), seed=site.study.seed).eval()
    terms: dict[str, list[Tensor]] = {}
    for case in site.split("train"):
        image = torch.tensor(site.volumes[case.case].image[0][None, None], dtype=torch.float32)
        with torch.no_grad(), deepest_features(network) as seen:
            network(image, torch.zeros(1, dtype=torch.long))
        squares = (discriminator(seen.features) - float(target)).square()
        terms.setdefault(case.patient, []).append(squares.mean())
    assert sorted(len(own) for own in terms.values()) == [1, 1, 1, 2]
    loss = torch.stack([torch.stack(own).mean() for own in terms.values()]).mean()
    loss.backward()
    return {n: p.grad for n, p in discriminator.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("labels", "target"), [("all", False), ("none", True)])
@pytest.mark.parametrize("shift", [None, 0.05])
def test_it_is_the_gradient_of_its_own_term(data, tmp_path, labels, target, shift):
    """Under the discriminator that was given; before there is one, under that of the seed."""
    site = open_site(data, tmp_path, labels=labels)
    discriminator = FeatureDiscriminator(8, seed=site.study.seed)
    given = Given()
    if shift is not None:
        weights = {k: v + shift for k, v in discriminator.state_dict().items()}
        discriminator.load_state_dict(weights)
        given = Given(discriminator=weights)
    answer, form = ask(site, given)
    schema = form.schema("discriminator")
    manifest, flat = decode(answer.payloads["discriminator"], kind=Kind.STATISTICS, schema=schema)
    assert manifest.values == {"patients": 3, "target": int(target)}
    assert (manifest.round, bool(manifest.base)) == (1, True)
    found = unflatten(flat, schema)
    for name, tensor in wanted(site, discriminator, target=target).items():
        assert tensor.abs().max() > 1e-6
        torch.testing.assert_close(found[f"discriminator/{name}"], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "study", "said"),
    [
        (OPEN, {}, "given"),
        (Policy(), {}, "not_opted_in"),
        (Policy(statistics=("amplitude", "prototypes"), min_cases=1), {}, "not_opted_in"),
        (Policy(statistics=("discriminator",), min_cases=5), {}, "too_few_patients"),
        (OPEN, {"min_patients": 5}, "too_few_patients"),
    ],
)
@pytest.mark.parametrize("labels", ["all", "none"])
def test_a_policy_or_too_few_patients_keep_it_here(data, tmp_path, policy, study, said, labels):
    site = open_site(data, tmp_path, policy, study_of(**study), labels=labels)
    answer, _ = ask(site)
    assert json.loads(answer.text) == {"discriminator": said}
    assert list(answer.payloads) == (["discriminator"] if said == "given" else [])


def test_labels_of_too_few_patients_are_no_reason_to_change_sides(data, tmp_path):
    """Two of four have labels: as a source there are too few, and a target it is not."""
    answer, _ = ask(open_site(data, tmp_path, labels=2))
    assert json.loads(answer.text) == {"discriminator": "too_few_patients"}


def test_it_stands_in_the_ledger(data, tmp_path):
    ledger = Ledger(tmp_path / "book", KEY)
    ask(open_site(data, tmp_path), ledger=ledger)
    sent, said = show(ledger.folder)
    assert (sent.kind, sent.values) == ("statistics", {"patients": 3, "target": 0})
    assert {t.name.partition("/")[0] for t in sent.tensors} == {"discriminator"}
    assert said.text == '{"discriminator": "given"}'
