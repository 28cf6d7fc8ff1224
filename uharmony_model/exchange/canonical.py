"""One text for one meaning: configuration objects as canonical JSON, and back.

Keys are sorted, there are no spaces, everything is ASCII. What was received is accepted only if
writing it again gives the same bytes, so duplicate keys, NaN, other number forms and stray spaces
are refused without a rule for each.
"""

from __future__ import annotations

import json
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError

from uharmony_model.errors import PayloadError
from uharmony_model.frozen import Frozen

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
OptionalDigest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Model = TypeVar("Model", bound=Frozen)


def canonical_json(model: Frozen) -> str:
    """The canonical text of an object.

    Raises:
        ValueError: free-form content holds NaN or infinity, which JSON does not have.
    """
    return json.dumps(model.model_dump(), sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse_canonical(model: type[Model], text: bytes | str, *, what: str, max_bytes: int) -> Model:
    """Read an object from its canonical text; `what` names it in the message.

    Raises:
        PayloadError: the text is too long, is not JSON, says something that is not allowed, or
            is not the canonical text of what it says.
    """
    if len(text) > max_bytes:
        raise PayloadError(f"{what}: {len(text)} bytes, at most {max_bytes} are allowed; refused")
    try:
        # Strict: no true for 1, no "1" for 1. The parser bounds nesting by itself.
        content = model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise PayloadError(f"{what}: {explain(error)}") from None
    received = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if canonical_json(content).encode() != received:
        raise PayloadError(f"{what}: not canonical JSON; keys sorted, no spaces, ASCII expected")
    return content


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, on one line, whatever characters were received."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "(top level)"
    return f"{ascii(where)[:80]}: {ascii(first['msg'])[:200]}"
