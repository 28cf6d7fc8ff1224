from __future__ import annotations

import pytest

from uharmony_client.site_config import SiteConfig, load_cases, load_site
from uharmony_model.errors import ConfigError, DataError


@pytest.fixture
def site_of(tmp_path):
    def load(text):
        path = tmp_path / "site.yaml"
        path.write_text(text)
        return load_site(path)

    return load


FULL = """
name: north
cases: data/cases.csv
store: /var/lib/store
volumes: ../volumes
annotated: [core]
modality_map: {MRT1: T1}
label_map: {7: 2, 4: 0}
policy: {clip_norm: 3.0}
resources: {threads: 2, device: cpu, max_voxels: 1000}
"""


def test_paths_are_relative_to_the_file(site_of, tmp_path):
    config = site_of(FULL)
    assert config.cases == tmp_path / "data/cases.csv"
    assert str(config.store) == "/var/lib/store"
    assert config.volumes == tmp_path / "../volumes"
    assert config.label_map == {7: 2, 4: 0}
    assert config.resources.max_voxels == 1000
    assert config.policy.clip_norm == 3.0


def test_the_short_form_has_defaults(site_of):
    config = site_of("name: north\ncases: .\nstore: store\n")
    assert config.volumes is None
    assert config.annotated is None
    assert config.resources.device == "auto"
    assert config.resources.max_voxels == 512**3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("name: ../../etc", "name"),
        ("surprise: 1", "unknown key 'surprise'"),
        ("label_map: {1: 300}", "label_map"),
        ("label_map: {-1: 1}", "label_map"),
        ("annotated: []", "annotated"),
        ("resources: {device: tpu}", "device"),
        ("resources: {max_voxels: 0}", "max_voxels"),
        ("store: null", "store"),
    ],
)
def test_wrong_settings_name_their_key(site_of, change, expected):
    key = change.partition(":")[0]
    base = {"name": "north", "cases": ".", "store": "store"}
    lines = [f"{k}: {v}" for k, v in base.items() if k != key]
    with pytest.raises(ConfigError, match=expected):
        site_of("\n".join([*lines, change]))


def test_annotated_classes_and_their_label_values(config, study):
    task = study.task  # edema: 1 and 3, core: 2
    assert config.annotates(task) == (True, True)
    assert config.label_values(task) == {0, 1, 2, 3}
    only = config.model_copy(update={"annotated": ("edema",)})
    assert only.annotates(task) == (True, False)
    assert only.label_values(task) == {0, 1, 3}
    wrong = config.model_copy(update={"annotated": ("edema", "bone")})
    with pytest.raises(ConfigError, match="bone; the study's classes are edema, core"):
        wrong.annotates(task)


def test_a_table_of_several_sites_is_narrowed_to_the_own_one(tmp_path):
    (tmp_path / "x.nii").write_bytes(b"x")
    (tmp_path / "c.csv").write_text("case,site,image\na,north,x.nii\nb,south,x.nii\nc,,x.nii\n")

    def site(name):
        return SiteConfig(name=name, cases=tmp_path / "c.csv", store=tmp_path)

    assert [c.case for c in load_cases(site("north")).cases] == ["a", "c"]
    assert [c.case for c in load_cases(site("west")).cases] == ["c"]
    (tmp_path / "c.csv").write_text("case,site,image\na,north,x.nii\n")
    with pytest.raises(DataError, match="no case of site west; it has north"):
        load_cases(site("west"))
