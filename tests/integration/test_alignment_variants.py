"""Styles by codes through a whole federation, and in one place; there with a discriminator too."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message
from torch import Tensor

from tests.support.tiny import tiny_study, write_folder
from uharmony_client.flower_app import make_client_app
from uharmony_client.ledger import Ledger
from uharmony_client.ledger_check import show
from uharmony_client.outgoing import Outgoing
from uharmony_client.site_models import site_network
from uharmony_client.workbench import carried_after
from uharmony_model.alignment.discriminator import FeatureDiscriminator
from uharmony_model.alignment.shared_discriminator import SharedDiscriminator
from uharmony_model.alignment.style_autoencoder import AutoencoderSettings, build_autoencoder
from uharmony_model.bundle import load_bundle
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.schema import unflatten
from uharmony_model.exchange.statistics import Said
from uharmony_model.features import deepest_features
from uharmony_model.initial import initial_weights
from uharmony_model.methods import METHODS
from uharmony_model.networks import training_network
from uharmony_model.schedule import finale_round
from uharmony_model.study import Study
from uharmony_model.training_settings import Finale
from uharmony_server.checkpoint import Checkpoint, load_latest
from uharmony_server.rounds import run_rounds
from uharmony_simulation.arms import Arm, Machine, SiteOpener, run_arm
from uharmony_simulation.config import Simulation
from uharmony_simulation.division import POOLED
from uharmony_simulation.engine import InProcessGrid, site_of
from uharmony_simulation.sites import make_sites

MACHINE = Machine(threads=1, device="cpu")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIZE, ROUNDS = 16, 4
CASES = {"east": 3, "few": 2, "north": 4, "shy": 3}
SOURCE = Simulation.model_validate(
    {
        "source": {
            "kind": "folder",
            "sites_from": "column",
            "labels": dict.fromkeys(("few", "north", "shy"), "none"),
        }
    }
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(
        "uharmony_model.networks.build_autoencoder",
        partial(build_autoencoder, AutoencoderSettings(features=4, blocks=1)),
    )


def study_of(method: str, **unlabelled) -> Study:
    return tiny_study(
        method=method,
        network={"features": [4, 8]},
        training={"rounds": ROUNDS, "local_steps": 1, "batch_size": 1, "patch": [SIZE] * 3},
        evaluation={"validation": 0.0, "test": 0.0, "every": 0, "bootstrap": 1},
        unlabelled={"min_patients": 3, "warm_up": 0, "threshold": 0.51, **unlabelled},
    )


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """East has labels; `north` gives codes, `shy` gives nothing, `few` has too few patients."""
    root = tmp_path_factory.mktemp("home")
    data = write_folder(root / "volumes", CASES, size=SIZE)
    make_sites(study_of("glua-fed"), SOURCE, data, root / "sites")
    path = root / "sites" / "shy" / "site.yaml"
    content = yaml.safe_load(path.read_text())
    assert "codes" in content["policy"].pop("statistics")
    path.write_text(yaml.safe_dump(content))
    path = root / "sites" / POOLED / "site.yaml"
    content = yaml.safe_load(path.read_text())
    content["resources"] = {**content.get("resources", {}), "checkpoint_steps": 1}
    path.write_text(yaml.safe_dump(content))
    return root / "sites"


class Run:
    """An arm with stores and ledgers of its own."""

    def __init__(self, sites: Path, folder: Path, study: Study) -> None:
        self.study, self.folder = study, folder
        self.arm = Arm.of(study, study.method, study.seed, tuple(CASES))
        self.opener = SiteOpener(self.arm, sites, MACHINE, folder / "stores")
        self.orders: dict[tuple[str, int], Instruction] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.discriminators: dict[int, SharedDiscriminator | None] = {}

    def ledger(self, site: str) -> Path:
        return self.folder / "books" / site

    def __call__(
        self, *, kill: tuple[str, int] | None = None, cut: tuple[int, int] | None = None
    ) -> Checkpoint:
        """To the end; or until a site is asked for a round, or a step of a round is done."""

        def on_step(site: str, round_: int, step: int, loss: float) -> None:
            if cut == (round_, step):
                raise KeyboardInterrupt

        inner = make_client_app(
            self.opener,
            outgoing=lambda site: Outgoing(Ledger(self.ledger(site.name), KEY), site.config.policy),
            on_step=on_step,
        )

        def app(message: Message, context: Context) -> Message:
            site = site_of(context, dict(enumerate(sorted(self.arm.sites))))
            text = str(message.content.config_records["instruction"]["json"])
            order = Instruction.from_json(text)
            if kill == (site, order.round):
                raise KeyboardInterrupt
            if order.action == "train":
                self.orders[site, order.round] = order
            return inner(message, context)

        def done(state: Checkpoint) -> None:
            self.weights[state.round] = unflatten(state.global_.clone(), schema)
            given = state.statistics
            self.discriminators[state.round] = None if given is None else given.discriminator

        schema, initial = initial_weights(self.arm.study)
        grid = InProcessGrid(app, self.arm.sites)
        return run_rounds(
            self.arm.study, schema, initial, grid, self.folder / "server", on_round=done
        )

    def kept(self) -> dict[str, Tensor]:
        """What the one place carries after the last round."""
        return carried_after(self.opener.named(POOLED), ROUNDS)


# --- federated -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def federation(sites, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "uharmony_model.networks.build_autoencoder",
            partial(build_autoencoder, AutoencoderSettings(features=4, blocks=1)),
        )
        run = Run(sites, tmp_path_factory.mktemp("run"), study_of("glua-fed", style="codes"))
        return run, run()


def test_the_ledger_of_a_site_without_labels_names_what_left(federation):
    run, state = federation
    assert state.refusals == ()
    entries = [e for e in show(run.ledger("north")) if e.kind in ("update", "statistics")]
    payloads = [e for e in entries if e.tensors]
    assert [(e.kind, e.round) for e in payloads] == [
        ("update", 1),
        ("update", 2),
        ("statistics", 0),
        ("update", 3),
        ("update", 4),
    ]
    (codes,) = [e for e in payloads if e.kind == "statistics"]
    assert [(t.name, t.shape) for t in codes.tensors] == [
        ("style_centroids", (1, 8)),
        ("style_spread", (1, 8)),
    ]
    assert codes.values == {"patients": 3}
    names = {t.name.partition(".")[0] for t in payloads[0].tensors}
    assert names == {"network", "style"}
    # What it says of prototypes: it has no labels for them, in any round.
    texts = [e.text for e in entries if e.text]
    assert texts[1] == '{"codes": "given", "prototypes": "too_few_patients"}'
    for quiet in ("shy", "few"):
        assert not [e for e in show(run.ledger(quiet)) if e.kind == "statistics" and e.tensors], (
            quiet
        )


def test_codes_are_asked_for_when_the_autoencoder_rests_and_used_in_the_next_round(federation):
    run, state = federation
    asked = {n: run.orders["north", n].statistics for n in range(1, ROUNDS + 1)}
    assert asked == {
        1: ("prototypes",),
        2: ("codes", "prototypes"),
        3: ("prototypes",),
        4: ("prototypes",),
    }
    assert state.statistics is not None
    assert set(state.statistics.codes) == {"east", "north"}
    # Two that were given, and one about them for those who give none.
    assert len(state.statistics.combined().codes) == 3


def test_the_autoencoder_learns_at_all_sites_and_comes_to_rest(federation):
    run, state = federation
    start = unflatten(initial_weights(run.study)[1], initial_weights(run.study)[0])
    style = [name for name in start if name.startswith("style.")]
    assert style
    assert any(not torch.equal(run.weights[1][name], start[name]) for name in style)
    for number in (2, 3, 4):
        assert all(torch.equal(run.weights[number][n], run.weights[1][n]) for n in style)
    rest = [name for name in start if not name.startswith("style.")]
    assert any(not torch.equal(run.weights[4][n], run.weights[1][n]) for n in rest)
    assert state.counted == (tuple(sorted(CASES)),) * ROUNDS


def test_codes_change_what_is_learned(federation, sites, tmp_path):
    """The same with no site that gives any: weights part after the round that would use them."""
    run, _ = federation
    other = Run(sites, tmp_path, run.study)
    opened = other.opener.named
    other.opener.named = lambda name, on_case=None: _silent(opened(name, on_case))  # type: ignore[method-assign]
    other()
    for number in (1, 2):
        assert all(torch.equal(v, run.weights[number][k]) for k, v in other.weights[number].items())
    assert not all(torch.equal(v, run.weights[3][k]) for k, v in other.weights[3].items())


def _silent(site, what="codes"):
    allowed = tuple(s for s in site.config.policy.statistics if s != what)
    policy = site.config.policy.model_copy(update={"statistics": allowed})
    return dataclasses.replace(site, config=site.config.model_copy(update={"policy": policy}))


@pytest.mark.parametrize("at", [("north", 2), ("few", 3)])
def test_a_killed_coordinator_ends_with_the_same_weights(federation, sites, tmp_path, at):
    run, state = federation
    again = Run(sites, tmp_path, run.study)
    with pytest.raises(KeyboardInterrupt):
        again(kill=at)
    assert again().digest == state.digest


# --- a discriminator of all sites ----------------------------------------------------------------


@pytest.fixture(scope="module")
def adversarial(sites, tmp_path_factory):
    study = study_of("glua-fed", align="discriminator")
    run = Run(sites, tmp_path_factory.mktemp("adversarial"), study)
    return run, run()


def test_a_rounds_discriminator_is_one_step_of_the_pooled_one(adversarial):
    """Its loss in one place: a patch is as large as a volume, so the draws do not matter."""
    run, state = adversarial
    assert state.refusals == ()
    network = training_network(run.study, ("x",), seed=run.study.seed).eval()
    pooled = FeatureDiscriminator(8, seed=run.study.seed)
    loss = torch.zeros(())
    for name, wanted in (("east", 0.0), ("north", 1.0)):  # `shy` says nothing, `few` has too few
        site = run.opener.named(name)
        terms = []
        for case in site.split("train"):
            image = torch.tensor(site.volumes[case.case].image[0][None, None], dtype=torch.float32)
            with torch.no_grad(), deepest_features(network) as seen:
                network(image, torch.zeros(1, dtype=torch.long))
            terms.append((pooled(seen.features) - wanted).square().mean())
        assert len(terms) == CASES[name]
        loss = loss + torch.stack(terms).mean()
    loss.backward()
    squares = [float((p.grad**2).sum()) for p in pooled.parameters() if p.grad is not None]
    for parameter in pooled.parameters():
        assert parameter.grad is not None
        parameter.grad /= sum(squares) ** 0.5
    torch.optim.Adam(pooled.parameters(), lr=1e-3, betas=(0.9, 0.99)).step()
    found = run.discriminators[1]
    assert found is not None
    for name, parameter in pooled.named_parameters():
        assert parameter.grad is not None
        # Adam's first step divides by the gradient: where there is none its sign is rounding's.
        clear = parameter.grad.abs() > 1e-6
        assert clear.any()
        torch.testing.assert_close(
            found.weights[name][clear], parameter.detach()[clear], rtol=0, atol=1e-6
        )
    assert [run.discriminators[n].steps for n in range(1, ROUNDS + 1)] == [1, 2, 3, 4]


def test_every_site_is_asked_for_a_gradient_in_every_round(adversarial):
    run, state = adversarial
    assert {run.orders[s, 1].statistics for s in CASES} == {("amplitude", "discriminator")}
    assert {run.orders[s, 3].statistics for s in ("east", "north")} == {("discriminator",)}
    said = {site: words["discriminator"] for site, words in state.statistics.said.items()}
    assert said == {
        "east": Said.GIVEN,
        "few": Said.TOO_FEW_PATIENTS,
        "north": Said.GIVEN,
        "shy": Said.NOT_OPTED_IN,
    }
    sent = [e for e in show(run.ledger("north")) if e.kind == "statistics" and e.tensors]
    assert [(e.round, e.values) for e in sent if "target" in e.values] == [
        (n, {"patients": 3, "target": 1}) for n in range(1, ROUNDS + 1)
    ]


def test_a_site_that_gives_none_learns_with_it_all_the_same(adversarial, sites, tmp_path):
    """Without the labelled side there is none, and nobody without labels is taught."""
    run, _ = adversarial
    other = Run(sites, tmp_path, run.study)
    opened = other.opener.named
    other.opener.named = lambda name, on_case=None: _silent(  # type: ignore[method-assign]
        opened(name, on_case), "discriminator"
    )
    other()
    assert other.discriminators[ROUNDS] is None
    assert all(torch.equal(v, run.weights[1][k]) for k, v in other.weights[1].items())
    assert not all(torch.equal(v, run.weights[2][k]) for k, v in other.weights[2].items())


@pytest.mark.parametrize("at", [("north", 2), ("few", 3)])
def test_with_a_discriminator_a_killed_coordinator_ends_with_the_same(
    adversarial, sites, tmp_path, at
):
    run, state = adversarial
    again = Run(sites, tmp_path, run.study)
    with pytest.raises(KeyboardInterrupt):
        again(kill=at)
    assert again().digest == state.digest
    one, other = run.discriminators[ROUNDS], again.discriminators[ROUNDS]
    assert one is not None
    assert other is not None
    assert all(torch.equal(v, other.tensors()[k]) for k, v in one.tensors().items())


# --- in one place --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unlabelled",
    [{"style": "codes"}, {"align": "discriminator"}, {"style": "codes", "align": "discriminator"}],
    ids=["codes", "discriminator", "both"],
)
def test_in_one_place_an_interruption_changes_no_bit(sites, tmp_path, unlabelled):
    assert METHODS["glua"].pooled
    study = study_of("glua", **unlabelled)
    whole = Run(sites, tmp_path / "whole", study)
    whole()
    cut = Run(sites, tmp_path / "cut", study)
    for round_, step in ((1, 1), (2, 2), (3, 0)):
        with pytest.raises(KeyboardInterrupt):
            cut(cut=(round_, step))
    cut()
    one, other = whole.kept(), cut.kept()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    carried = {name.split("/")[1] for name in one if name.startswith("unlabelled/")}
    assert ("discriminator" in carried) is ("align" in unlabelled)
    assert initial_weights(study)[0].tensors == ()  # nothing is shared
    assert any(name.startswith("style.") for name in one) is ("style" in unlabelled)


@pytest.mark.parametrize("method", ["glua", "glua-fed"])
@pytest.mark.parametrize("steps", [0, 1])
def test_the_model_of_an_arm_predicts_without_the_autoencoder(sites, tmp_path, method, steps):
    """With steps at home too: what a site keeps of its own is handed out without it as well."""
    study = study_of(method, style="codes")
    study = study.model_copy(update={"finale": Finale(steps=steps)})
    arm, stores = Arm.of(study, method, study.seed, tuple(CASES)), tmp_path / "stores"
    run_arm(arm, sites, tmp_path / "arm", MACHINE, figures=False, stores=stores)
    opener = SiteOpener(arm, sites, MACHINE, stores)
    site = opener.named(POOLED if METHODS[method].pooled else "east")
    state = load_latest(
        tmp_path / "arm" / "server", arm.study.digest, initial_weights(arm.study)[0]
    )
    assert state is not None
    last = finale_round(arm.study) if steps else ROUNDS
    carried = carried_after(site, last)
    trained = site_network(site, unflatten(state.global_, state.schema), carried).eval()
    model = load_bundle(tmp_path / "arm" / "model", site.name)
    assert any(name.startswith("style.") for name in trained.state_dict())
    assert not any(name.startswith("style.") for name in model.network.state_dict())
    image = torch.randn(1, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.network(image), trained(image))
