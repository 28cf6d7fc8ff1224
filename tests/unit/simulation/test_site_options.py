"""Simulated sites that draw or have less than others: what stands in their site.yaml."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from uharmony_client.local_train import train_round
from uharmony_client.site import Site
from uharmony_client.site_config import load_site
from uharmony_model.errors import ConfigError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.schema import unflatten
from uharmony_model.initial import initial_weights
from uharmony_model.networks import build_network
from uharmony_model.study import Study
from uharmony_simulation.config import Simulation
from uharmony_simulation.sites import make_sites

SHAPE = (8, 9, 10)
VALUES = {"head": 1, "tail": 2}


@pytest.fixture
def data(tmp_path):
    """Two sites with three cases of two modalities in one file; every label has both classes."""
    folder = tmp_path / "data"
    rows = []
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for site in ("east", "west"):
        for number in range(3):
            name = f"{site}{number}"
            image = rng.normal(size=(*SHAPE, 2)).astype(np.float32)
            label = np.zeros(SHAPE, np.uint8)
            label[2, 2, 2:4], label[4, 4, 4:7] = 1, 2
            nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "images" / f"{name}.nii.gz")
            nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labels" / f"{name}.nii.gz")
            rows.append({"case": name, "patient": name, "site": site, "modality": "MR|PT"})
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "patient", "site", "modality"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def study(*, presence: bool = True, **task) -> Study:
    zscore = {"policy": "zscore"}
    return Study.model_validate(
        {
            "name": "test",
            "task": {
                "classes": VALUES,
                "channels": 2,
                "presence": presence,
                "intensity": {"MR": zscore, "PT": zscore},
                **task,
            },
            "evaluation": {"validation": 0, "test": 0.3},
        }
    )


def made(chosen: Study, data: Path, folder: Path, **options) -> dict[str, Site]:
    source = {"kind": "folder", "sites_from": "column", **options}
    simulation = Simulation.model_validate({"source": source})
    names = make_sites(chosen, simulation, data, folder / "sites")
    return {
        name: Site.open(
            load_site(folder / "sites" / name / "site.yaml"),
            chosen,
            own_cases_only=name != "pooled",
        )
        for name in (*names, "pooled")
    }


def label_values(site: Site) -> set[int]:
    labels = [volume.label for volume in site.volumes.values()]
    return {int(value) for label in labels if label is not None for value in np.unique(label)}


def test_a_site_draws_only_its_classes(data, tmp_path):
    annotated = {"east": ["head"], "west": ["tail"]}
    sites = made(study(), data, tmp_path, annotated=annotated)
    assert sites["east"].annotated.tolist() == [True, False]
    assert sites["west"].annotated.tolist() == [False, True]
    assert label_values(sites["east"]) == {0, 1}
    assert label_values(sites["west"]) == {0, 2}
    # The reference keeps what its sites are left without.
    assert sites["pooled"].annotated.tolist() == [True, True]
    assert label_values(sites["pooled"]) == {0, 1, 2}


def test_volumes_and_labels_stay_where_they_lie(data, tmp_path):
    sites = made(study(), data, tmp_path, annotated={"east": ["head"]}, missing={"west": ["PT"]})
    for site in sites.values():
        for case in site.table.cases:
            assert case.label is not None
            assert case.image[0].resolve().parent == data / "images"
            assert case.label.resolve().parent == data / "labels"


def test_a_site_gives_only_its_modalities(data, tmp_path):
    sites = made(study(), data, tmp_path, missing={"west": ["PT"]})
    for name, expected in {"east": (True, True), "west": (True, False)}.items():
        for volume in sites[name].volumes.values():
            assert tuple(volume.present) == expected
            assert [bool(np.any(channel)) for channel in volume.image] == list(expected)
    assert all(all(v.present) for v in sites["pooled"].volumes.values())


def test_sites_of_other_modalities_train_tensors_of_one_shape(data, tmp_path):
    """A site moves nothing of the stem's kernels for a modality that it does not have."""
    changes = {
        "method": "fedavg",
        "network": {"features": (4, 8)},
        "training": {"local_steps": 2, "patch": (8, 8, 8), "weight_decay": 0},
    }
    chosen = Study.model_validate(study().model_dump() | changes)
    sites = made(chosen, data, tmp_path, missing={"west": ["PT"]})
    schema, base = initial_weights(chosen)
    for name, expected in {"east": [True] * 4, "west": [True, False, True, False]}.items():
        network = build_network(chosen, sites[name].domains, seed=0)
        result = train_round(
            network,
            sites[name].training_data(),
            study=chosen,
            partition=Partition.of(network, chosen.plan.local),
            base=base,
            before={},
            round_=1,
        )
        update = unflatten(result.update, schema)
        stem = [t for t in update.values() if t.ndim == 5 and t.shape[1] == 4 and len(t) == 4]
        assert len(stem) == 2  # the first convolution, and the one in its skip
        for tensor in stem:
            assert tensor.abs().amax(dim=(0, 2, 3, 4)).bool().tolist() == expected


def test_only_named_sites_have_something_in_their_file(data, tmp_path):
    overlapping = study(overlapping=True, classes={"whole": [1, 2], "tail": 2})
    made(overlapping, data, tmp_path, annotated={"east": ["tail"]})
    files = {
        name: yaml.safe_load((tmp_path / "sites" / name / "site.yaml").read_text())
        for name in ("east", "west", "pooled")
    }
    # Value 1 is in `whole` alone, 2 in both.
    assert files["east"]["annotated"] == ["tail"]
    assert files["east"]["label_map"] == {1: 0}
    for name in ("west", "pooled"):
        assert not {"annotated", "label_map", "missing"} & set(files[name])


@pytest.mark.parametrize(
    ("options", "presence", "expected"),
    [
        ({"annotated": {"north": ["head"]}}, True, r"annotated names \['north'\]"),
        ({"missing": {"north": ["PT"]}}, True, r"missing names \['north'\]"),
        ({"annotated": {"east": ["liver"]}}, True, "annotated names liver"),
        ({"missing": {"east": ["CT"]}}, True, "missing names CT; the study has MR, PT"),
        ({"missing": {"east": ["MR", "PT"]}}, True, "missing names every modality"),
        ({"missing": {"east": ["PT"]}}, False, r"task\.presence is false"),
    ],
)
def test_what_cannot_be_is_refused(data, tmp_path, options, presence, expected):
    with pytest.raises(ConfigError, match=expected):
        made(study(presence=presence), data, tmp_path, **options)
    assert not (tmp_path / "sites").exists()
