"""The faults that take long are tried with `./scripts/test --faults`, or with `-m faults`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.federation import Federation, Undisturbed, copied, joined, undisturbed

ALL = "UHARMONY_FAULTS"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long ones out, unless they were asked for."""
    if os.environ.get(ALL) or "faults" in str(config.option.markexpr):
        return
    out = [item for item in items if item.get_closest_marker("faults")]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(scope="session")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The run without a fault."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, wanted: Undisturbed) -> Federation:
    """A federation that has joined; it is copied, never run."""
    return joined(tmp_path_factory.mktemp("joined"), wanted)


@pytest.fixture
def federation(tmp_path: Path, wanted: Undisturbed, template: Federation) -> Iterator[Federation]:
    """A federation of this test's own; its processes end with the test."""
    made = copied(template, tmp_path / "federation", wanted)
    try:
        yield made
    finally:
        made.kill_everything()
