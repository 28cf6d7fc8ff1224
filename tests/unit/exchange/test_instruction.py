from __future__ import annotations

import pytest

from tests.support import wire
from uharmony_model.errors import PayloadError
from uharmony_model.exchange.instruction import MAX_INSTRUCTION_BYTES, Instruction, Receipt

TRAIN = Instruction(action="train", study=wire.STUDY, round=4, base=wire.BASE)
TEXT = (
    f'{{"action":"train","base":"{wire.BASE}","final":false,"receipt":null,"round":4,"splits":[],'
    f'"study":"{wire.STUDY}"}}'
)


def test_the_text_is_canonical():
    assert TRAIN.to_json() == TEXT
    assert Instruction.from_json(TEXT) == Instruction.from_json(TEXT.encode()) == TRAIN


@pytest.mark.parametrize(
    "instruction",
    [
        Instruction(action="hello", study=wire.STUDY, round=0),
        Instruction(action="finish", study=wire.STUDY, round=9),
        TRAIN.model_copy(update={"receipt": Receipt(seq=3, sha256=wire.BASE)}),
        Instruction(
            action="evaluate",
            study=wire.STUDY,
            round=9,
            base=wire.BASE,
            final=True,
            splits=("validation", "test"),
        ),
    ],
)
def test_every_action_comes_back(instruction):
    assert Instruction.from_json(instruction.to_json()) == instruction


def test_the_message_names_the_field():
    with pytest.raises(PayloadError, match=r"instruction: 'round'.*integer"):
        Instruction.from_json(TEXT.replace('"round":4', '"round":"4"'))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        TEXT + " ",
        TEXT.replace(":", ": "),
        TEXT.replace("train", "run_code"),
        TEXT.replace('"round":4', '"round":-4'),
        TEXT.replace('"round":4', '"round":"4"'),
        TEXT.replace('"round":4', '"round":NaN'),
        TEXT.replace('"round":4', '"round":3,"round":4'),
        TEXT.replace("false", "0"),
        TEXT.replace("[]", '["../.."]'),
        TEXT.replace("[]", "[" * 3000 + "]" * 900),
        TEXT.replace(wire.STUDY, wire.STUDY.upper()),
        TEXT[:-1] + ',"url":"http://x"}',
        TEXT[:-1] + ',"\\u001b[2J\\n":1}',
        " " * (MAX_INSTRUCTION_BYTES + 1),
        "\ud800",
        b"\xff\xfe",
        TEXT.encode("utf-16"),
    ],
)
def test_anything_else_is_refused_on_one_line(text):
    with pytest.raises(PayloadError) as caught:
        Instruction.from_json(text)
    assert str(caught.value).isprintable()
