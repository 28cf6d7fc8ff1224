"""What the server asks a site to do. Data, never code."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, SerializerFunctionWrapHandler, model_serializer

from uharmony_model.evaluation_settings import Split
from uharmony_model.exchange.canonical import (
    Digest,
    OptionalDigest,
    canonical_json,
    parse_canonical,
)
from uharmony_model.frozen import Frozen
from uharmony_model.unlabelled_settings import Statistic

MAX_INSTRUCTION_BYTES = 4096


class Receipt(Frozen):
    """The head of a site's ledger, as the coordinator has seen it: `seq` and SHA-256 of a line."""

    seq: NonNegativeInt
    sha256: Digest


class Instruction(Frozen):
    """One request: say hello, train a round from the global weights `base`, or evaluate them.

    `final` asks for what is done once, after the last round; `splits` says on which cases to
    evaluate; `finale` asks for the site's own steps from the last weights, in the round after the
    last; `publish` asks for what the site publishes, in the round after that; `finish` says that
    the study is over. `receipt` returns to a site what the coordinator has seen of its ledger, so
    that neither can rewrite it later.

    With a round come `statistics`, those that the site is asked for, and `given`, the SHA-256 of
    the payload of statistics that comes beside the weights; empty where none does. An instruction
    without them says nothing of them.
    """

    action: Literal["hello", "train", "evaluate", "finale", "publish", "finish"]
    study: Digest
    round: Annotated[NonNegativeInt, Field(lt=2**31)]
    base: OptionalDigest = ""
    final: bool = False
    splits: tuple[Split, ...] = ()
    receipt: Receipt | None = None
    statistics: tuple[Statistic, ...] = ()
    given: OptionalDigest = ""

    @model_serializer(mode="wrap")
    def _said(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = default(self)
        for name in ("statistics", "given"):
            if not content[name]:
                del content[name]
        return content

    def to_json(self) -> str:
        """The canonical text, as it is sent."""
        return canonical_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Instruction:
        """Read what was sent.

        Raises:
            PayloadError: the text is too long or is not the canonical text of an instruction.
        """
        return parse_canonical(cls, text, what="instruction", max_bytes=MAX_INSTRUCTION_BYTES)
