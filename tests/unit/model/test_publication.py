"""What sites published: written and read again, and refused where it is damaged or not allowed."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.support import published as support
from uharmony_model import publication as module
from uharmony_model.abstention import AbstentionLimit
from uharmony_model.errors import ConfigError, PartitionError, StoreError
from uharmony_model.prototypes import Prototype, PublicFrame
from uharmony_model.publication import (
    Frame,
    Prototypes,
    Publication,
    SiteExperts,
    read_publication,
    write_publication,
)
from uharmony_model.study import Study


@pytest.fixture
def study() -> Study:
    return Study.model_validate(
        {
            "name": "test",
            "seed": 4,
            "task": {"classes": {"core": 1}, "intensity": {"T1": {"policy": "zscore"}}},
            "network": {"features": (4, 8), "residual_units": 0},
            "training": {"patch": (8, 8, 8)},
        }
    )


def prototype(domain="north.n1", numbers=2, **changes) -> Prototype:
    content = {"mean": (0.1,) * numbers, "patients": 10, "noise": 0.2, "epsilon": 1, "delta": 1e-5}
    return Prototype.model_validate({"domain": domain, **content, **changes})


def experts(site="north", domains=("n1",), patients=10) -> dict[str, SiteExperts]:
    draw = torch.Generator().manual_seed(len(site))
    residuals = {
        f"{key}@{domain}": torch.randn(3, generator=draw)
        for domain in domains
        for key in ("a", "b")
    }
    return {site: SiteExperts(dict.fromkeys(domains, patients), residuals)}


def test_what_was_written_is_read(tmp_path, study):
    written = support.publication(study)
    write_publication(tmp_path, written)
    found = read_publication(tmp_path)
    assert found is not None
    assert found.prototypes == written.prototypes
    assert found.experts.keys() == {"north", "south"}
    for site, expected in written.experts.items():
        assert dict(found.experts[site].patients) == dict(expected.patients)
        assert found.experts[site].residuals.keys() == expected.residuals.keys()
        for key, tensor in expected.residuals.items():
            assert torch.equal(found.experts[site].residuals[key], tensor)
    assert [expert.name for expert in found.all_experts] == list(support.NAMES)
    files = ["north.json", "north.safetensors", "south.json", "south.safetensors"]
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == files


def test_a_model_without_one(tmp_path):
    assert read_publication(tmp_path) is None
    (tmp_path / "experts").mkdir()
    assert read_publication(tmp_path) is None


def test_either_part_may_be_missing_and_an_earlier_one_goes(tmp_path, study):
    both = support.publication(study)
    write_publication(tmp_path, both)
    write_publication(tmp_path, Publication(prototypes=both.prototypes))
    found = read_publication(tmp_path)
    assert found is not None
    assert found.experts == {}
    assert found.all_experts == ()
    write_publication(tmp_path, Publication({"south": both.experts["south"]}))
    found = read_publication(tmp_path)
    assert found is not None
    assert found.prototypes is None
    assert found.experts.keys() == {"south"}
    write_publication(tmp_path, Publication())
    assert read_publication(tmp_path) is None


def test_the_digest_is_that_of_the_content(tmp_path):
    digests = []
    for number, patients in enumerate((10, 10, 11)):
        folder = tmp_path / str(number)
        write_publication(folder, Publication(experts(patients=patients)))
        found = read_publication(folder)
        assert found is not None
        digests.append(found.digest)
    assert digests[0] == digests[1] != digests[2]
    parts = (tmp_path / "0" / "experts" / f"north.{kind}" for kind in ("json", "safetensors"))
    digest = hashlib.sha256()
    for path in parts:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    assert digests[0] == digest.hexdigest()


def test_the_frame_is_drawn_again_from_its_numbers():
    frame = Frame(dimension=12, seed=3, coordinates=4, center=(0.5,), scale=(2.0,) * 12)
    expected = PublicFrame.of(12, seed=3, coordinates=4, center=0.5, scale=np.full(12, 2.0))
    row = np.linspace(-1, 1, 12)
    np.testing.assert_array_equal(frame.public.rows(row), expected.rows(row))
    with pytest.raises(ValidationError, match="expected one number or 12, got 2"):
        Frame(dimension=12, seed=3, center=(0.0, 1.0))


def test_the_limit_itself_is_not_beyond_it():
    limit = AbstentionLimit(limit=2.0, margin=0.1)
    assert [limit.abstains(d) for d in (0.0, 2.0, np.nextafter(2.0, 3), np.nan)] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("prototypes", "message"),
    [
        ([prototype(), prototype()], "one name"),
        ([prototype(numbers=3)], "of 3 numbers, not 2"),
        ([prototype(epsilon=None, delta=None, noise=0)], "not released"),
        ([prototype(patients=9)], "not released"),
        ([], "at least 1"),
    ],
)
def test_prototypes_that_may_not_be_published(prototypes, message):
    with pytest.raises(ValidationError, match=message):
        Prototypes(frame=Frame(dimension=2, seed=0), prototypes=tuple(prototypes))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (experts(patients=9), ConfigError, "9 patients"),
        ({"north": SiteExperts({"n1": 10}, {"a": torch.ones(1)})}, PartitionError, "no domain"),
        (
            {"north": SiteExperts({"n1": 10, "n2": 10}, {"a@n1": torch.ones(1)})},
            ConfigError,
            "tensors of n1, patients of n1, n2",
        ),
        ({"north": SiteExperts({"n1": 10}, {})}, ConfigError, "no domain"),
        (experts(site="n" * 40, domains=("d" * 40,)), ConfigError, "shorten"),
        (experts(site="../up"), ConfigError, "shorten"),
        (
            experts(site="a", domains=("b.c",)) | experts(site="a.b", domains=("c",)),
            ConfigError,
            "two have one name",
        ),
    ],
)
def test_experts_that_may_not_be_published_leave_nothing(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        write_publication(tmp_path / "model", Publication(given))
    assert not (tmp_path / "model").exists()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def reseal(path, change):
    """Change the content and seal it again, as one who means harm would."""
    content = json.loads(path.read_text())["content"]
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": content}
    path.write_text(json.dumps(sealed))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("experts/north.safetensors", flip, "not the tensors"),
        ("experts/north.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1]), "not the tens"),
        ("experts/north.safetensors", lambda p: p.unlink(), "FileNotFoundError"),
        ("experts/north.json", lambda p: p.rename(p.with_name("south.json")), "FileNotFound"),
        ("experts/north.json", lambda p: p.rename(p.with_name(".x.json")), "no site's name"),
        ("experts/north.json", lambda p: p.write_text("{"), "JSONDecodeError"),
        ("experts/north.json", lambda p: p.write_text("[" * 99_999), "RecursionError"),
        ("experts/north.json", lambda p: p.write_text("[]"), "expected sha256 and content"),
        (
            "experts/north.json",
            lambda p: p.write_text(p.read_text().replace("10", "99")),
            "not what was written",
        ),
        (
            "experts/north.json",
            lambda p: reseal(p, lambda c: c["patients"].update(n1=9)),
            "greater than or equal to 10",
        ),
        (
            "experts/north.json",
            lambda p: reseal(p, lambda c: c["patients"].update(n2=10)),
            "expected the same domains",
        ),
        ("prototypes.json", lambda p: p.write_text("x"), "JSONDecodeError"),
        (
            "prototypes.json",
            lambda p: reseal(p, lambda c: c["prototypes"][0].update(mean=[1e999, 0])),
            "finite number",
        ),
        (
            "prototypes.json",
            lambda p: reseal(p, lambda c: c["frame"].update(dimension=10**9)),
            "less than or equal to 4096",
        ),
        (
            "prototypes.json",
            lambda p: reseal(p, lambda c: c["prototypes"][0].update(epsilon=None)),
            "not released",
        ),
        ("prototypes.json", lambda p: reseal(p, lambda c: c.update(more=1)), "unknown key 'more'"),
    ],
)
def test_damage_is_one_line(tmp_path, name, damage, message):
    frame = Frame(dimension=2, seed=0)
    write_publication(
        tmp_path, Publication(experts(), Prototypes(frame=frame, prototypes=(prototype(),)))
    )
    damage(tmp_path / name)
    with pytest.raises(StoreError, match=message) as raised:
        read_publication(tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_tensors_that_are_none_of_the_format(tmp_path):
    write_publication(tmp_path, Publication(experts()))
    tensors = tmp_path / "experts" / "north.safetensors"
    tensors.write_bytes(b"\xff" * 64)
    digest = hashlib.sha256(tensors.read_bytes()).hexdigest()
    reseal(tmp_path / "experts" / "north.json", lambda c: c.update(sha256=digest))
    with pytest.raises(StoreError, match="not readable"):
        read_publication(tmp_path)


@pytest.mark.parametrize(
    ("bound", "message"),
    [("_MAX_JSON_BYTES", "larger than 20"), ("_MAX_TENSOR_BYTES", "larger than 20")],
)
def test_sizes_are_bounded(tmp_path, monkeypatch, bound, message):
    write_publication(tmp_path, Publication(experts()))
    monkeypatch.setattr(module, bound, 20)
    with pytest.raises(StoreError, match=message):
        read_publication(tmp_path)


def test_the_number_of_sites_is_bounded(tmp_path, monkeypatch):
    write_publication(tmp_path, Publication(experts() | experts(site="south")))
    monkeypatch.setattr(module, "_MAX_SITES", 1)
    with pytest.raises(StoreError, match="2 sites, at most 1"):
        read_publication(tmp_path)
