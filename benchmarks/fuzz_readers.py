"""The readers that a fuzz run feeds, and what must hold for whatever they accept.

Each makes one input from its draws, reads it, and names what came of it. Only the errors that the
reader documents are caught.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from benchmarks import fuzz_inputs as inputs
from tests.support import wire
from uharmony_client.nifti import load_volume
from uharmony_client.volume_error import VolumeError
from uharmony_model.errors import ConfigError, PayloadError
from uharmony_model.exchange.canonical import parse_canonical
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.joining import EnrolmentRequest, JoinCode
from uharmony_model.exchange.payload import Kind, Manifest, decode
from uharmony_server.admission import Admitted, Expected, Refusal, admit, admit_metrics

_MAX_VOXELS = 1 << 20
_BOUND = 100.0  # of the norm
Read = Callable[[random.Random], str]


def reader(kind: str, folder: Path) -> Read:
    """The reader of `payloads` (and texts) or of `volumes`, which lie in `folder` while read."""
    torch.set_num_threads(1)
    return {"payloads": _payloads, "volumes": _volumes}[kind](folder)


def _payloads(folder: Path) -> Read:
    corpus, texts = inputs.payloads(), inputs.texts()
    expected = [
        Expected(site=inputs.SITE, study=wire.STUDY, round=inputs.ROUND, base=wire.BASE,
                 schema=inputs.SCHEMA, codec=codec, max_cases=100, norm_limit=_BOUND)
        for codec in ("fp32", "bf16")
    ]  # fmt: skip

    def read(draw: random.Random) -> str:
        if draw.random() < 0.2:
            what, content = draw.choice(texts)
            return _text(what, inputs.mutate(content, draw))
        which = draw.randrange(len(corpus))
        data = inputs.mutated_payload(corpus[which], draw)
        with suppress(PayloadError):
            decode(data, kind=draw.choice(list(Kind)), schema=inputs.SCHEMA)
        verdict = (
            admit_metrics(data, expected[0]) if which == 3 else admit(data, expected[which == 1])
        )
        if isinstance(verdict, Refusal):
            return verdict.reason.value
        if isinstance(verdict, Admitted):
            whole = verdict.flat.shape == (inputs.SCHEMA.numel,)
            finite = bool(torch.isfinite(verdict.flat).all())
            if not (whole and finite and 0 <= verdict.norm <= _BOUND):
                raise AssertionError("an update was admitted that is not what was promised")
        return "admitted"

    return read


def _text(what: str, content: bytes) -> str:
    documented = ConfigError if what == "join code" else PayloadError
    try:
        if what == "join code":
            JoinCode.from_text(content.decode("latin-1"))
        elif what == "instruction":
            Instruction.from_json(content)
        elif what == "enrolment":
            parse_canonical(EnrolmentRequest, content, what=what, max_bytes=1 << 16)
        else:
            parse_canonical(Manifest, content, what=what, max_bytes=1 << 20)
    except documented:
        return f"{what}: refused"
    return f"{what}: read"


def _volumes(folder: Path) -> Read:
    corpus, path = inputs.volumes(), folder / "volume.nii"

    def read(draw: random.Random) -> str:
        data = inputs.mutated_volume(draw.choice(corpus), draw)
        path.write_bytes(data)
        try:
            found = load_volume(path, max_voxels=_MAX_VOXELS, max_channels=4)
        except VolumeError as error:
            return error.reason
        array = found.array
        if (
            array.dtype != np.float32
            or array.size > 4 * _MAX_VOXELS
            or not np.isfinite(array).all()
        ):
            raise AssertionError("a volume was read that is not what was promised")
        return "read"

    return read
