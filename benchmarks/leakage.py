"""What can be learned of a patient from shared statistics: `python -m benchmarks.leakage`.

One site of examples/studies/hippocampus-unlabelled.yaml shares, another attacks: it is a curious
site that knows the code, the study, the weights, how many patients a mean is of, and its own
patients. The minimum number of patients is switched off, to see what it guards against. Written
are leakage.json, leakage.md and leakage.png; docs/leakage.md says what they mean. The picture
shows patches of real patients: it is for whoever has the data, and is not part of the project.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import leakage_attacks as attacks
from benchmarks import leakage_data as data
from benchmarks.leakage_attacks import Floats
from benchmarks.leakage_report import Row, markdown, picture
from benchmarks.leakage_statistics import (
    Statistic,
    amplitude_of,
    codes_of,
    gradients_of,
    prototypes_of,
)
from uharmony_model.atomic import make_directory, write_atomic
from uharmony_model.errors import ConfigError
from uharmony_model.randomness import numpy_generator

PATIENTS = (1, 2, 5, 10, 24)
TARGETS = 24
RELEASES = 100  # random ones for each number of patients, for membership
STARTS = 3
NEAR, SMOOTH = 1.0, 1.0
TRAINING_STEPS = 60
STEPS = {"amplitude": 60, "prototypes": 40, "codes": 40, "discriminator": 40}
GRADIENT_RELEASES = {"amplitude": TARGETS, "prototypes": 8, "codes": 8, "discriminator": 4}
KNOWN = ("likelihood ratio, patches known", "likelihood ratio, images known")
BASELINES = ("another patient", "average patient", "constant")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all attacks and write what came out.

    Raises:
        ConfigError: more patients than the sharing site has, less one.
        DataError: the volumes cannot be read.
    """
    options = _options(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        town = data.read_town(options.data, Path(folder))
        network = data.trained_network(town, TRAINING_STEPS)
        counts, most = options.patients, len(town.sharing) - 1
        if max(counts) > most:
            raise ConfigError(f"--patients {max(counts)}; expected {most} at most with these data")
        found: dict[str, Any] = {
            "study": town.study.name,
            "attribution": town.attribution,
            "seed": options.seed,
            "torch": torch.__version__,
            "minimum of patients in use": town.study.unlabelled.min_patients,
            "patients of the sharing site": len(town.sharing),
            "patients of the attacker": len(town.curious),
            "steps of training of the network, and of the autoencoder": TRAINING_STEPS,
        }
        rows: list[Row] = []
        autoencoder = data.trained_autoencoder(town, TRAINING_STEPS)
        for statistic in (
            amplitude_of(town),
            prototypes_of(town, network),
            codes_of(town, autoencoder),
            gradients_of(town, network),
        ):
            result, shown = _attacked(statistic, town, counts, options.seed)
            found[statistic.name] = result
            rows += shown
        found["seconds"] = round(time.perf_counter() - started, 1)
    make_directory(options.out)
    write_atomic(options.out / "leakage.json", json.dumps(found, indent=1).encode(), 0o644)
    table = markdown(found)
    write_atomic(options.out / "leakage.md", table.encode(), 0o644)
    write_atomic(options.out / "leakage.png", picture(rows, town.attribution))
    print(table)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leakage", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the hippocampus data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patients", type=_counts, default=PATIENTS, help="1,2,5,10,24")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("expected numbers of patients, 1 or more")
    return counts


def _attacked(
    statistic: Statistic, town: data.Town, counts: Sequence[int], seed: int
) -> tuple[dict[str, Any], list[Row]]:
    result: dict[str, Any] = {"numbers": statistic.rows.shape[1]}
    rows: list[Row] = []
    kinds: dict[str, dict[int, Any]] = {"reconstruction": {}, "membership": {}, "differencing": {}}
    for n in counts:
        kinds["reconstruction"][n], shown = _reconstructed(statistic, town, n, seed)
        kinds["membership"][n] = _membership(statistic, n, seed)
        kinds["differencing"][n] = _differencing(statistic, n, seed)
        if n in (counts[0], 10):
            rows.append(shown)
    return result | kinds, rows


def _reconstructed(
    statistic: Statistic, town: data.Town, n: int, seed: int
) -> tuple[dict[str, Any], Row]:
    """Attacks on releases over n patients, each patient a target once, beside the baselines."""
    draw = numpy_generator(seed, statistic.name, n, "reconstruction")
    order = numpy_generator(seed, "targets").permutation(len(town.sharing))
    most = GRADIENT_RELEASES[statistic.name]
    groups = [order[i : i + n].tolist() for i in range(0, max(1, min(TARGETS // n, most)) * n, n)]
    shared = np.stack([statistic.release(group) for group in groups])
    guesses = _guesses(statistic, town, shared, draw)
    misfit = statistic.misfit(torch.from_numpy(statistic.view(shared)).float())
    targets = [(g, patient) for g, group in enumerate(groups) for patient in group]
    scores: dict[str, tuple[Floats, Floats]] = {}
    for name, images in guesses.items():
        pairs = [(images[g], town.sharing[p].style) for g, p in targets]
        scores[name] = (
            np.array([attacks.correlation(*pair) for pair in pairs]),
            np.array([attacks.psnr(*pair) for pair in pairs]),
        )
    figures: dict[str, dict[str, Any]] = {
        name: {
            kind: asdict(attacks.mean_interval(values, draw))
            for kind, values in zip(("correlation", "psnr"), both, strict=True)
        }
        for name, both in scores.items()
    }
    for name, images in guesses.items():
        with torch.no_grad():
            figures[name]["misfit"] = float(misfit(images).mean())
    gains = {
        kind: _gain({name: both[k] for name, both in scores.items()}, draw)
        for k, kind in enumerate(("correlation", "psnr"))
    }
    group, patient = targets[0]
    shown = {name: found[group] for name, found in guesses.items()}
    title = f"{statistic.name}, {n} patient{'s' * (n > 1)}"
    row = Row(title, town.sharing[patient].style, shown)
    return {"targets": len(targets), "scores": figures, "gain": gains}, row


def _gain(scores: Mapping[str, Floats], draw: np.random.Generator) -> dict[str, Any]:
    """The best attack less the best baseline, each best by its mean over the targets."""
    attack = max((name for name in scores if name not in BASELINES), key=lambda n: scores[n].mean())
    baseline = max(BASELINES, key=lambda name: scores[name].mean())
    gain = attacks.mean_interval(scores[attack] - scores[baseline], draw)
    return {"attack": attack, "baseline": baseline, **asdict(gain)}


def _guesses(
    statistic: Statistic, town: data.Town, shared: Floats, draw: np.random.Generator
) -> dict[str, Tensor]:
    """Guessed patches (G, C, D, H, W) for G releases, of every attack and baseline."""
    own = torch.stack([patient.style.mean(0) for patient in town.curious])
    shape, count = own.shape[1:], len(shared)
    average = own.mean(0).expand(count, *shape)
    view = statistic.view(statistic.own)
    wanted = torch.from_numpy(statistic.view(shared)).float()
    misfit = statistic.misfit(wanted)
    steps = STEPS[statistic.name]
    starts = [attacks.smooth_noise(draw, (count, *shape)) for _ in range(STARTS)]
    tries = [attacks.reconstruct(misfit, s, smooth=SMOOTH, steps=steps) for s in starts]
    # The attacker cannot see which start came closest to the truth, only which fits.
    best = torch.stack([left for _, left in tries]).argmin(0)
    noise = torch.stack([tries[int(b)][0][g] for g, b in enumerate(best)])
    closest = np.stack(
        [attacks.nearness(row, view, attacks.Population.of(view)) for row in wanted.numpy()]
    ).argmax(1)
    nearest = torch.stack([town.curious[int(i)].style[0] for i in closest])

    def near(start: Tensor) -> Tensor:
        return attacks.reconstruct(
            misfit, start, prior=start, near=NEAR, smooth=SMOOTH, steps=steps
        )[0]

    decoder = attacks.Decoder.learned(statistic.own, own.flatten(1).double().numpy())
    others = draw.integers(len(town.curious), size=count)
    return {
        "from noise": noise,
        "from the average": near(average),
        "from the nearest": near(nearest),
        "linear decoder": torch.from_numpy(decoder(shared)).float().view(count, *shape),
        "another patient": torch.stack([town.curious[int(i)].style[0] for i in others]),
        "average patient": average,
        "constant": torch.zeros(count, *shape),
    }


def _membership(statistic: Statistic, n: int, seed: int) -> dict[str, Any]:
    """Whose statistic is in a mean over n patients, of all patients of the site."""
    draw = numpy_generator(seed, statistic.name, n, "membership")
    population = attacks.Population.of(statistic.own)
    patients = len(statistic.rows)
    apart = population.standard(statistic.own) - population.standard(statistic.own_again)
    within = attacks.shrunk_covariance(apart)
    member = np.zeros((RELEASES, patients), dtype=np.bool_)
    scores = {name: np.zeros(member.shape) for name in (*KNOWN, "distance, patches known")}
    for number in range(RELEASES):
        chosen = np.sort(draw.choice(patients, size=n, replace=False)).tolist()
        member[number, chosen] = True
        shared = statistic.release(chosen)
        for name, of, noise in zip(
            KNOWN, (statistic.rows, statistic.rows_again), (None, within), strict=True
        ):
            scores[name][number] = attacks.likelihood_ratio(shared, of, population, n, noise)
        near = attacks.nearness(shared, statistic.rows, population)
        scores["distance, patches known"][number] = near
    return {
        name: asdict(attacks.area_under_curve(found, member, draw))
        for name, found in scores.items()
    }


def _differencing(statistic: Statistic, n: int, seed: int) -> dict[str, float]:
    """Two releases that differ by one patient: that patient's numbers, and how exactly.

    The error is in standard deviations over patients.
    """
    draw = numpy_generator(seed, statistic.name, n, "differencing")
    population, errors = attacks.Population.of(statistic.own), []
    for _ in range(20):
        chosen = draw.choice(len(statistic.rows), size=n + 1, replace=False).tolist()
        larger, smaller = statistic.release(sorted(chosen)), statistic.release(sorted(chosen[1:]))
        found = attacks.differenced(torch.from_numpy(larger), torch.from_numpy(smaller), n + 1)
        truth = population.standard(statistic.rows[chosen[0]])
        errors.append(float(np.abs(population.standard(found.numpy()) - truth).max()))
    return {"median": float(np.median(errors)), "largest": max(errors)}


if __name__ == "__main__":
    sys.exit(main())
