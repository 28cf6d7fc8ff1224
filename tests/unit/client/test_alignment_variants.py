"""The other forms of alignment: styles by codes, a discriminator, nothing; each by its equation."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.few_labels import (
    Cut,
    Place,
    checkpoint,
    data_of,
    same,
    stored,
    study_of,
)
from uharmony_client.adversary import Adversary
from uharmony_client.alignment_objective import Alignment
from uharmony_client.code_styles import SLICES
from uharmony_client.finale_plan import carried_view, learning_view
from uharmony_client.learning import Given, objective_of
from uharmony_client.local_train import RoundResult
from uharmony_client.objective import LocalData
from uharmony_client.optimizer import make_optimizer
from uharmony_client.personal import UNLABELLED
from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.alignment.code_style import drawn_codes, in_codes, patch_codes
from uharmony_model.alignment.discriminator import FeatureDiscriminator
from uharmony_model.alignment.style_autoencoder import (
    AutoencoderSettings,
    StyleAutoencoder,
    build_autoencoder,
)
from uharmony_model.alignment.style_codes import StyleCodes
from uharmony_model.alignment.style_losses import random_contrast, restyling_loss
from uharmony_model.errors import NetworkError, StoreError
from uharmony_model.exchange.schema import unflatten
from uharmony_model.features import deepest_features
from uharmony_model.losses import segmentation_loss
from uharmony_model.networks import autoencoder_of, build_network
from uharmony_model.patches import draw_batch
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study

CODES: dict[str, Any] = {"style": "codes", "style_rounds": 1}
ADVERSARY = {"align": "discriminator"}
VARIANTS: dict[str, dict[str, Any]] = {
    "codes": CODES,
    "discriminator": ADVERSARY,
    "both": {**CODES, **ADVERSARY},
    "off": {"align": "off"},
    "codes-off": {**CODES, "align": "off"},
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """An autoencoder of a tenth of the numbers, with codes as long as they are."""
    monkeypatch.setattr(
        "uharmony_model.networks.build_autoencoder",
        partial(build_autoencoder, AutoencoderSettings(features=4, blocks=1)),
    )


def variant(name: str, method: str = "glua", **changes: Any) -> Study:
    return study_of("glua", method, unlabelled=VARIANTS[name], **changes)


def images(study: Study, data: LocalData, round_: int, step: int) -> tuple[Tensor, Tensor]:
    """A step's labelled and unlabelled patches, drawn anew."""
    found = [
        draw_batch(cases, study.task, study.training, study.seed, site, round_, step).image
        for site, cases in (("alpha", data.volumes), ("alpha/unlabelled", data.unlabelled))
    ]
    return found[0], found[1]


def style_of(result: RoundResult) -> dict[str, Tensor]:
    return {k: v for k, v in result.local.items() if k.startswith("style.")}


# --- the autoencoder -----------------------------------------------------------------------------


def test_one_step_of_the_autoencoder_is_one_of_adam_on_its_losses():
    study, data = variant("codes"), data_of()
    network = Place(study).network()
    other = copy.deepcopy(autoencoder_of(network))
    objective = Alignment(data, study)
    objective.loss(network, 1, 0, drop=False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    objective.moved(network, 1, 0)

    draw = numpy_generator(study.seed, "alpha", 1, 0, "slices")
    picked = []
    for patches in images(study, data, 1, 0):
        every = patches[:, 0].movedim(3, 1).reshape(-1, 1, 8, 8)  # axial: across the last axis
        shown = every[every.amax((1, 2, 3)) > every.amin((1, 2, 3))]
        picked.append(shown[draw.integers(len(shown), size=SLICES)])
    x = torch.cat(picked)
    assert x.shape == (2 * SLICES, 1, 8, 8)
    t = other.encode_style(x.flip(0)).detach()
    c, s = other.encode_content(x), other.encode_style(x)
    y = other.decode(c, t, (8, 8))
    again = other.encode_content(y)
    loss = (
        10 * (x - other.decode(c, s, (8, 8))).abs().mean()
        + 10 * (x - other.decode(again, s, (8, 8))).abs().mean()
        + (c - again).abs().mean()
        + (t - other.encode_style(y)).abs().mean()
        + 10 * restyling_loss(other, x, draw)
    )
    loss.backward()
    nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    torch.optim.Adam(other.parameters(), lr=1e-3, betas=(0.5, 0.9)).step()
    for name, value in autoencoder_of(network).state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-5)
    # Nothing of it is left for the network's own step.
    assert all(p.grad is None for p in autoencoder_of(network).parameters())
    moved = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert all(name.startswith("style.") for name in moved)


def test_a_site_with_one_kind_of_cases_learns_from_random_contrasts(monkeypatch):
    study, seen = variant("codes", "glua-fed"), []

    def watched(x: Tensor, draw: np.random.Generator, knots: int = 4) -> Tensor:
        seen.append(x)
        return random_contrast(x, draw, knots)

    monkeypatch.setattr("uharmony_client.code_styles.random_contrast", watched)
    for data, count in ((data_of([]), 1), (data_of(None, []), 1), (data_of(), 0)):
        seen.clear()
        objective, network = Alignment(data, study), Place(study).network()
        objective.loss(network, 1, 0, drop=False)
        objective.moved(network, 1, 0)
        assert len(seen) == count


def test_the_autoencoder_learns_in_its_rounds_and_rests_afterwards():
    study = variant("codes", training={"rounds": 4})
    place, data = Place(study), data_of()
    start = {k: v for k, v in place.network().state_dict().items() if k.startswith("style.")}
    first = place.round(data)
    assert style_of(first).keys() == start.keys()
    assert not any(torch.equal(v, start[k]) for k, v in style_of(first).items() if "weight" in k)
    assert not any(name.startswith(f"{UNLABELLED}style/") for name in first.local)
    second = place.round(data, 2, before=first.local)
    assert all(torch.equal(v, style_of(first)[k]) for k, v in style_of(second).items())


@pytest.mark.parametrize("keep", [True, False])
def test_the_moments_are_carried_while_it_learns(keep):
    study = study_of(
        "glua",
        "glua",
        unlabelled={"style": "codes", "style_rounds": 2},
        training={"rounds": 4, "keep_optimizer": keep},
    )
    place, data = Place(study), data_of()
    first = place.round(data)
    kept = {k for k in first.local if k.startswith(f"{UNLABELLED}style/")}
    assert bool(kept) is keep
    second = place.round(data, 2, before=first.local)
    assert not any(k.startswith(f"{UNLABELLED}style/") for k in second.local)
    less = {k: v for k, v in first.local.items() if k not in kept}
    without = style_of(place.round(data, 2, before=less))
    changed = not all(torch.equal(v, without[k]) for k, v in style_of(second).items())
    assert changed is keep


def test_no_logit_and_no_optimiser_of_the_network_knows_the_autoencoder():
    study = variant("codes")
    network = Place(study).network()
    image = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    before = network(image)
    with torch.no_grad():
        for parameter in autoencoder_of(network).parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(network(image), before)
    held = {
        id(p) for g in make_optimizer(network, study.training).param_groups for p in g["params"]
    }
    assert not held & {id(p) for p in autoencoder_of(network).parameters()}
    plain = build_network(study, ("x",), seed=0)
    assert torch.equal(plain.train()(image), before)
    with pytest.raises(NetworkError, match="no style autoencoder"):
        autoencoder_of(plain)


# --- images in codes -----------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_after_its_rounds_labelled_patches_are_shown_in_codes_too(given):
    study = variant("codes-off", "uharmony", training={"rounds": 4})
    place, data = Place(study, ("x", "y")), data_of(domains=2)
    network = place.network()
    # Untrained, codes of all slices are nearly one.
    with torch.no_grad():
        autoencoder_of(network).style_encoder.head.weight.mul_(20)
    styles = [
        StyleCodes(np.full((1, 8), value), np.full((1, 8), 0.1 * value)) for value in (1.0, 2.0)
    ]
    objective = Alignment(data, study, codes=styles if given else ())
    found = objective.loss(network, 2, 1, drop=False)

    batch = draw_batch(data.volumes, study.task, study.training, study.seed, "alpha", 2, 1)
    domain = torch.tensor([data.domains[case] for case in batch.cases])
    codes = patch_codes(autoencoder_of(network), images(study, data, 2, 1)[1], 3)
    if given:
        draw = numpy_generator(study.seed, "alpha", 2, 1, "style")
        chosen = draw.integers(2, size=2)
        codes = torch.stack([drawn_codes(styles[i], draw) for i in chosen])
    changed = in_codes(autoencoder_of(network), batch.image, codes, 3)
    assert not torch.allclose(changed, batch.image, atol=0.1)
    terms = [
        segmentation_loss(network(shown, domain), batch.label, study.task, data.annotated)
        for shown in (batch.image, changed)
    ]
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)
    # In the first round, and where no style is known, they are shown as they are.
    first = objective._styled(network, batch.image, 1, 1)
    alone = Alignment(data_of(None, []), study)._styled(network, batch.image, 2, 1)
    assert first is None
    assert alone is None


def test_masks_of_presence_and_absent_channels_stay(monkeypatch):
    intensity = {"CT": {"policy": "zscore"}, "MR": {"policy": "zscore"}}
    study = variant(
        "codes",
        task={"channels": 2, "presence": True, "intensity": intensity},
        training={"modality_dropout": 0.4, "batch_size": 6},
    )
    cases = [
        [case.__class__(**{**vars(case), "present": (True, True)}) for case in stored(2, seed, 2)]
        for seed in (0, 1)
    ]
    objective, network = Alignment(data_of(*cases), study), Place(study).network()
    image, _, _ = objective.labelled(network, 2, 0)
    target, _ = objective.unlabelled(network, 2, 0)
    changed = objective._styled(network, image, 2, 0)
    assert changed is not None
    assert torch.equal(changed[:, 2:], image[:, 2:])
    hidden = (image[:, 2:].amax((2, 3, 4)) == 0) | (target[:, 2:].amax((2, 3, 4)) == 0)
    assert 0 < int(hidden.sum()) < hidden.numel()
    for b, c in np.ndindex(6, 2):
        assert torch.equal(changed[b, c], image[b, c]) == bool(hidden[b, c])


def test_a_site_without_labels_learns_styles_alone_at_first_and_counts():
    study = variant("codes", "glua-fed", training={"rounds": 4})
    place, data = Place(study), data_of([])
    first = place.round(data)
    schema = place.partition.shared_schema
    by_name = unflatten(first.update, schema)
    moved = {name for name, delta in by_name.items() if bool(delta.any())}
    assert moved
    assert all(name.startswith("style.") for name in moved)
    assert (first.share, first.loss) == (1.0, 0.0)
    wave = torch.arange(16).reshape(2, 8).float()
    known = Prototypes(wave.cos(), 1 + wave.sin().square(), torch.tensor([300.0, 200.0]))
    second = place.round(data, 2, before=first.local, given=Given((), known))
    by_name = unflatten(second.update, schema)
    moved = {name for name, delta in by_name.items() if bool(delta.any())}
    assert moved
    assert not any(name.startswith("style.") for name in moved)
    assert 0 < second.share < 1
    labelled = place.round(data_of(None, []))
    by_name = unflatten(labelled.update, schema)
    assert all(bool(by_name[name].any()) for name in by_name if name.endswith("weight"))


# --- the discriminator ---------------------------------------------------------------------------


def test_the_segmenter_pays_for_places_that_are_told_apart():
    study = study_of("glua", "glua", unlabelled={**ADVERSARY, "weight": 0.8})
    place, data = Place(study), data_of()
    network, objective = place.network(), Alignment(data, study)
    found = objective.loss(network, 2, 1, drop=False)
    labelled = objective.labelled_loss(network, 2, 1, drop=False)
    with deepest_features(network) as seen:
        network(images(study, data, 2, 1)[1], torch.zeros(2, dtype=torch.long))
    scores = FeatureDiscriminator(8, seed=study.seed)(seen.features)
    progress = 3 / 6
    mask = (2 * scores.detach() - 1).clamp(0, 1)
    term = 0.01 * ((1 + min(progress / 0.1, 1) * mask) * scores**2).mean()
    wanted = labelled + 0.8 * math.exp(-5 * (1 - progress) ** 2) * term
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert {n for n, _ in objective.carried().items() if n.startswith("prototypes/")} == set()


def test_the_mask_weighs_what_it_says():
    adversary = Adversary(0)
    features = torch.randn(2, 8, 4, 4, 4, generator=torch.Generator().manual_seed(1)) * 4
    scores = FeatureDiscriminator(8, seed=0)(features).detach()
    assert bool((scores > 0.5).any())
    mask = (2 * scores - 1).clamp(0, 1)
    for strength in (0.0, 0.5, 1.0):
        wanted = 0.01 * ((1 + strength * mask) * scores**2).mean()
        torch.testing.assert_close(adversary.fooling(features, strength).detach(), wanted)


def test_the_discriminator_steps_after_the_network_on_the_same_features():
    study, data = variant("discriminator"), data_of()
    network, objective = Place(study).network(), Alignment(data, study)
    loss = objective.loss(network, 1, 0, drop=False)
    loss.backward()
    own = objective._adversary
    assert isinstance(own, Adversary)
    source, target = own._source, own._target
    assert source is not None
    assert target is not None
    other = FeatureDiscriminator(8, seed=study.seed)
    assert own._made is not None
    made = own._made[1]
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in other.state_dict().items())
    assert all(p.grad is None for p in made.parameters())
    term = (other(source) ** 2).mean() + ((other(target) - 1) ** 2).mean()
    term.backward()
    torch.optim.Adam(other.parameters(), lr=1e-3, betas=(0.9, 0.99)).step()
    objective.moved(network, 1, 0)
    for name, value in made.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-6)
    weights = {k: v.clone() for k, v in made.state_dict().items()}
    own.learn()  # nothing was seen since
    assert all(torch.equal(v, weights[k]) for k, v in made.state_dict().items())


def test_a_gap_at_one_place_is_found_and_paid_for_there():
    adversary = Adversary(0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        source, target = torch.randn(2, 2, 8, 6, 6, 6, generator=generator)
        target[:, :4, :3] += 2.0  # the first half of the depth differs
        adversary.saw_source(source)
        adversary.fooling(target, 1.0)
        adversary.learn()
    target.requires_grad_(True)
    (gradient,) = torch.autograd.grad(adversary.fooling(target, 1.0), target)
    strength = gradient.square().sum((0, 1, 3, 4)).sqrt()
    assert strength[:2].mean() > 1.5 * strength[4:].mean()


def test_in_a_federation_it_is_the_one_that_was_given_and_rests():
    study, data = variant("discriminator", "glua-fed"), data_of([])
    weights = {k: v + 0.05 for k, v in FeatureDiscriminator(8, seed=5).state_dict().items()}
    given = Given(discriminator=weights)
    network = Place(study).network()
    objective = objective_of(data, study, given)
    assert isinstance(objective, Alignment)
    found = objective.loss(network, 2, 1, drop=False)
    image = objective.unlabelled(network, 2, 1)[0]
    with deepest_features(network) as seen:
        network(image, torch.zeros(len(image), dtype=torch.long))
    other = FeatureDiscriminator(8)
    other.load_state_dict(weights)
    scores = other(seen.features)
    progress = objective.progress(2, 1)
    mask = (2 * scores.detach() - 1).clamp(0, 1)
    term = 0.01 * ((1 + min(progress / 0.1, 1) * mask) * scores**2).mean()
    wanted = study.unlabelled.weight * math.exp(-5 * (1 - progress) ** 2) * term
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    found.backward()
    assert any(bool(p.grad.any()) for p in network.parameters() if p.grad is not None)
    objective.moved(network, 2, 1)
    again = objective_of(data, study, given)
    assert again is not None
    assert objective.share == 1
    assert not [k for k in objective.carried() if "discriminator" in k]


def test_before_one_is_given_a_site_without_labels_learns_nothing_and_weighs_nothing():
    study, data = variant("discriminator", "glua-fed"), data_of([])
    objective = Alignment(data, study)
    assert objective.loss(Place(study).network(), 1, 0, drop=False) == 0
    assert objective.share == 0


def test_a_side_alone_teaches_the_discriminator_nothing():
    study = variant("discriminator", "local")
    for data in (data_of([]), data_of(None, [])):
        network, objective = Place(study).network(), Alignment(data, study)
        objective.loss(network, 1, 0, drop=False).backward()
        objective.moved(network, 1, 0)
        fresh = FeatureDiscriminator(8, seed=study.seed).state_dict()
        kept = {k: v for k, v in objective.carried().items() if "/weights/" in k}
        assert all(torch.equal(v, fresh[k.rpartition("/")[2]]) for k, v in kept.items())


def test_a_kept_discriminator_of_another_network_is_named():
    study, data = variant("discriminator"), data_of()
    objective = Alignment(data, study)
    objective.restore({"discriminator/weights/layers.0.weight": torch.zeros(1)})
    with pytest.raises(StoreError, match="kept discriminator"):
        objective.loss(Place(study).network(), 1, 0, drop=False)


# --- nothing, and all of them --------------------------------------------------------------------


def test_without_alignment_a_site_without_labels_learns_and_counts_nothing():
    place = Place(variant("off", "glua-fed"))
    result = place.round(data_of([]))
    assert not bool(result.update.any())
    assert (result.share, result.loss) == (0.0, 0.0)
    study, data = place.study, data_of()
    network, objective = place.network(), Alignment(data, study)
    found = objective.loss(network, 2, 1, drop=False)
    assert torch.equal(found, objective.labelled_loss(network, 2, 1, drop=False))


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("labelled", [True, False])
def test_a_round_is_pure_and_a_cut_changes_no_bit(name, labelled, tmp_path):
    study = variant(name, "local" if "discriminator" in name or name == "both" else "uharmony")
    study = study.model_copy(
        update={"training": study.training.model_copy(update={"local_steps": 3})}
    )
    place = Place(study, ("x", "y"))
    data = data_of(None if labelled else [], domains=2)
    before = None
    base = place.base
    for number in (1, 2):
        settings: dict[str, Any] = {"before": before, "base": base}
        whole = place.round(data, number, **settings)
        kept = checkpoint(tmp_path / str(number), 1, number)
        with pytest.raises(Cut):
            place.round(data, number, cut_at=1, checkpoint=kept, **settings)
        taken: list[int] = []
        again = place.round(data, number, checkpoint=kept, taken=taken, **settings)
        assert taken == [2]
        assert same(again, whole)
        before, base = whole.local, base + whole.update


def test_what_the_discriminator_knows_is_carried_into_the_next_round():
    place, data = Place(variant("discriminator")), data_of()
    first = place.round(data)
    names = {k for k in first.local if k.startswith(f"{UNLABELLED}discriminator/")}
    assert {n.split("/")[2] for n in names} == {"weights", "optimizer"}
    less = {k: v for k, v in first.local.items() if k not in names}
    second = place.round(data, 2, before=first.local)
    assert not same(second, place.round(data, 2, before=less))


def test_what_a_site_is_told_of_them():
    assert "in the first round every site trains a style autoencoder" in learning_view(
        variant("codes", "glua-fed")
    )
    assert "moments of the style autoencoder" in carried_view(variant("codes", "glua-fed"))
    assert carried_view(variant("discriminator")) == "a discriminator of features"
    assert carried_view(variant("off")) == ""
    late = study_of("glua", "glua-fed", unlabelled={**CODES, "warm_up": 3}, training={"rounds": 4})
    assert "then, up to round 3, only sites with labels count" in learning_view(late)


def test_the_autoencoder_is_of_the_seed_and_leaves_the_network_as_it_was():
    network = Place(variant("codes")).network()
    plain = build_network(variant("codes"), ("x",), seed=0)
    state = network.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    assert isinstance(network.style, StyleAutoencoder)
