from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from uharmony_model.bundle import known_sites, load_bundle, save_bundle
from uharmony_model.errors import ConfigError, PartitionError, StoreError
from uharmony_model.exchange.partition import Partition
from uharmony_model.networks import build_network
from uharmony_model.study import Study


@pytest.fixture
def study() -> Study:
    """Two exclusive classes on one MR channel; tiny everywhere."""
    return Study.model_validate(
        {
            "name": "test",
            "task": {
                "classes": {"edema": (1, 3), "core": 2},
                "intensity": {"T1": {"policy": "zscore"}},
            },
            "network": {"features": (4, 8), "residual_units": 0},
            "training": {"patch": (8, 8, 8)},
        }
    )


@pytest.fixture
def write_bundle(tmp_path, study):
    """A model of random weights with two sites; north has two domains."""

    def write(method="uharmony", **options):
        chosen = study.model_copy(update={"method": method})
        folder = tmp_path / f"model-{method}"
        domains = {"north": ("n1", "n2"), "south": ("s",)}
        local: dict[str, dict[str, torch.Tensor]] = {}
        shared: dict[str, torch.Tensor] = {}
        for index, (site, names) in enumerate(domains.items()):
            network = build_network(chosen, names, seed=index)
            draw = torch.Generator().manual_seed(index)
            state = {
                key: tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
                for key, tensor in network.state_dict().items()
            }
            shared, local[site] = Partition.of(network, chosen.plan.local).split(state)
        save_bundle(folder, chosen, shared, local, domains, {"north": ("T1",)}, **options)
        return folder, shared, local

    return write


def test_a_site_gets_the_shared_and_its_own_tensors(write_bundle):
    folder, shared, local = write_bundle()
    model = load_bundle(folder, "north")
    assert model.domains == ("n1", "n2")
    assert model.modalities == ("T1",)
    assert not model.network.training
    again = Partition.of(model.network, model.study.plan.local).split(model.network.state_dict())
    for found, expected in zip(again, (shared, local["north"]), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any("@n2" in key for key in local["north"])


def test_undrawn_classes_come_from_the_shared_tensors(write_bundle):
    folder, _, _ = write_bundle(undrawn={"south": ("core",)})
    x = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    north, south, plain = (load_bundle(folder, site) for site in ("north", "south", None))
    assert north.predictor is north.network
    assert south.undrawn == ("core",)
    with torch.no_grad():
        found, shared = south.predictor(x, torch.tensor([0])), plain.network(x)
    ratio = (found[:, 2] - found[:, 0]) - (shared[:, 2] - shared[:, 0])  # core to background
    assert torch.allclose(ratio, torch.zeros_like(ratio), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "names", "wrong"),
    [("uharmony", ["liver"], "no classes liver"), ("fedbn-in", ["core"], "method fedbn-in")],
)
def test_undrawn_classes_that_no_shared_model_could_say_are_refused(
    write_bundle, method, names, wrong
):
    folder, _, _ = write_bundle(method)
    path = folder / "sites" / "south.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "undrawn": names}))
    with pytest.raises(StoreError, match=f"cannot say: the study has {wrong}; copy"):
        load_bundle(folder, "south")


def test_without_a_site_residuals_are_zero(write_bundle):
    folder, shared, _ = write_bundle()
    model = load_bundle(folder, None)
    assert model.domains == ()
    found, residuals = Partition.of(model.network, model.study.plan.local).split(
        model.network.state_dict()
    )
    assert all(torch.equal(found[key], shared[key]) for key in shared)
    assert residuals
    assert not any(tensor.any() for tensor in residuals.values())


@pytest.mark.parametrize("method", ["fedavg", "uharmony"])
def test_methods_without_needed_local_parts_work_without_a_site(write_bundle, method):
    folder, _, _ = write_bundle(method)
    x = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    assert load_bundle(folder, None).network(x).shape == (1, 3, 8, 8, 8)


@pytest.mark.parametrize("method", ["local", "fedbn-in"])
def test_methods_that_keep_weights_at_the_sites_need_one(write_bundle, method):
    folder, _, _ = write_bundle(method)
    with pytest.raises(ConfigError, match=r"keeps .*norm_affine.* choose --site from north, south"):
        load_bundle(folder, None)
    assert load_bundle(folder, "south").domains == ("s",)


def test_unknown_sites_are_answered_with_the_known_ones(write_bundle):
    folder, _, _ = write_bundle()
    assert known_sites(folder) == ("north", "south")
    for site in ("west", "../north", "north.json", ""):
        with pytest.raises(ConfigError, match="it has north, south"):
            load_bundle(folder, site)


def test_a_model_without_sites_can_be_handed_out(write_bundle):
    folder, _, _ = write_bundle()
    shutil.rmtree(folder / "sites")
    load_bundle(folder, None)
    with pytest.raises(ConfigError, match="it has none"):
        load_bundle(folder, "north")


def test_the_digest_tells_what_was_used(write_bundle):
    folder, _, _ = write_bundle()
    digests = {load_bundle(folder, site).digest for site in (None, "north", "south")}
    assert len(digests) == 3
    before = load_bundle(folder, None).digest
    (folder / "sites" / "north.safetensors").unlink()
    assert load_bundle(folder, None).digest == before
    weights = load_file(folder / "shared.safetensors")
    key = min(weights)
    weights[key][(0,) * weights[key].ndim] += 1e-3
    save_file(weights, folder / "shared.safetensors")
    assert load_bundle(folder, None).digest != before


@pytest.mark.parametrize("name", ["shared.safetensors", "sites/north.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "length"])
def test_damaged_weights_are_refused(write_bundle, name, damage):
    folder, _, _ = write_bundle()
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    changed = {"empty": b"", "truncated": content[:-1], "length": b"\xff" * 8 + content[8:]}
    if damage != "missing":
        path.write_bytes(changed[damage])
    with pytest.raises(StoreError, match="copy the model again"):
        load_bundle(folder, "north")


def test_weights_of_another_network_are_refused(write_bundle):
    folder, _, _ = write_bundle()
    content = json.loads((folder / "study.json").read_text())
    content["network"]["features"] = [4, 16]
    (folder / "study.json").write_text(json.dumps(content))
    with pytest.raises(PartitionError):
        load_bundle(folder, "north")


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("study.json", "{", StoreError),
        ("study.json", "[" * 100_000, StoreError),
        ("study.json", "{}", ConfigError),
        ("study.json", " " * (1 << 21), StoreError),
        ("sites/north.json", "[]", ConfigError),
        ("sites/north.json", '{"domains": []}', ConfigError),
        ("sites/north.json", '{"domains": ["../x"]}', ConfigError),
    ],
)
def test_damaged_descriptions_are_refused_in_one_line(write_bundle, name, text, error):
    folder, _, _ = write_bundle()
    (folder / name).write_text(text)
    with pytest.raises(error) as caught:
        load_bundle(folder, "north")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no study\.json"):
        load_bundle(tmp_path, None)


def test_writing_again_replaces_the_whole_folder(write_bundle):
    folder, _, _ = write_bundle()
    (folder / "stale").write_text("")
    write_bundle()
    assert {path.name for path in folder.iterdir()} == {"study.json", "shared.safetensors", "sites"}


def test_notes_lie_beside_the_model_and_do_not_change_its_digest(tmp_path, study):
    network = build_network(study, ("n",), seed=0)
    shared, _ = Partition.of(network, study.plan.local).split(network.state_dict())
    save_bundle(tmp_path / "plain", study, shared, {}, {})
    save_bundle(tmp_path / "noted", study, shared, {}, {}, notes={"README.md": b"text"})
    assert (tmp_path / "noted" / "README.md").read_bytes() == b"text"
    digests = {load_bundle(tmp_path / name, None).digest for name in ("plain", "noted")}
    assert len(digests) == 1


def test_a_bundle_that_cannot_be_written_leaves_nothing(tmp_path, study):
    with pytest.raises(KeyError):
        save_bundle(tmp_path / "model", study, {}, {"north": {}}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_the_sites_own_needs_nothing_shared(tmp_path, study):
    """It is of the network of its own method: plain norms where the study's are harmonised."""
    network = build_network(study.with_method("local"), ("n",), seed=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5)
    state = network.state_dict()
    names = {"north": ("n",)}
    for own in ("local", "nonsense"):
        folder = tmp_path / own
        save_bundle(folder, study, {}, {"north": state}, names, own={"north": own})
        if own == "nonsense":
            with pytest.raises(ConfigError, match="unknown method 'nonsense'"):
                load_bundle(folder, "north")
            return
        found = load_bundle(folder, "north").network.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)
