"""The base of every configuration object, and the one place that reads YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from uharmony_model.errors import ConfigError

MAX_YAML_BYTES = 1 << 20


class Frozen(BaseModel):
    """A configuration object: typed, immutable, and unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Frozen)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping without aliases or tags.

    Raises:
        ConfigError: the file is missing, too large, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give the path of a YAML file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES} bytes; this is no configuration")
    try:
        text = path.read_text(encoding="utf-8")
        # Aliases can expand one kilobyte to gigabytes, so they are refused before they are built.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ConfigError(f"{path}: YAML aliases (*name) are not allowed; write the value out")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(content).__name__}")
    return content


def parse(model: type[Model], content: object, source: str) -> Model:
    """Check plain data against a configuration class.

    Raises:
        ConfigError: one line that names the first wrong key, what it got and what is expected.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top level)"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(model.model_fields))
            hint = f"; known at the top level: {known}" if len(first["loc"]) == 1 else ""
            raise ConfigError(f"{source}: unknown key '{where}'{hint}{more}") from None
        got = "" if first["type"] == "missing" else f", got {first['input']!r:.80}"
        raise ConfigError(f"{source}: {where}: {first['msg']}{got}{more}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
