"""Volume files, a small study and a site that the tests of this folder share."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.nifti_files import nifti_bytes
from uharmony_client.site_config import SiteConfig
from uharmony_model.study import Study

Writer = Callable[..., Path]


@pytest.fixture
def write_nifti(tmp_path: Path) -> Writer:
    """`write_nifti(name, array, **fields)` writes a file below tmp_path, gzipped if named so."""

    def write(name: str, array: np.ndarray, **fields: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = nifti_bytes(array, **fields)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


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
def config(tmp_path: Path) -> SiteConfig:
    """A site with nothing special about it."""
    return SiteConfig(name="north", cases=tmp_path / "cases.csv", store=tmp_path / "store")
