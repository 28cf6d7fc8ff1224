"""extension.json in a model's folder: the studies that the model was of before its own.

A network that has grown computes the old outputs to the bit only with the shapes of then
(`extension.keep_apart`), so whoever opens such a folder has to know them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import nn

from uharmony_model.errors import StoreError
from uharmony_model.extension import keep_apart
from uharmony_model.frozen import Frozen, parse
from uharmony_model.study import Study

LINE = "extension.json"
_MAX_BYTES = 1 << 20


class Line(Frozen):
    """The content of the file, oldest study first."""

    studies: Annotated[tuple[Study, ...], Field(min_length=1)]


def encode_line(studies: tuple[Study, ...]) -> bytes:
    """The content of the file for these studies."""
    return json.dumps({"studies": [json.loads(s.canonical_json()) for s in studies]}).encode()


def read_line(folder: Path) -> tuple[Study, ...]:
    """The studies that the model in `folder` was of before its own; none where it did not grow.

    Raises:
        StoreError: the file is damaged.
        ConfigError: it does not hold studies.
    """
    path = folder / LINE
    if not path.exists():
        return ()
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        plain = json.loads(content) if len(content) <= _MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}: not readable ({type(error).__name__}); copy the model again"
        ) from None
    if plain is None:
        raise StoreError(f"{path}: larger than {_MAX_BYTES} bytes; copy the model again")
    return parse(Line, plain, str(path)).studies


def keep_line_apart(network: nn.Module, folder: Path, study: Study) -> None:
    """`keep_apart` for a network of `study` that was opened from a model's folder.

    Raises:
        StoreError: the folder's extension.json is damaged.
        ConfigError: the study has not grown from the ones in it.
    """
    line = read_line(folder)
    if line:  # a site's own model is of its own method throughout
        same = (s if s.method == study.method else s.with_method(study.method) for s in line)
        keep_apart(network, *same, study)
