from __future__ import annotations

import hashlib
import json

import pytest
import torch

from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.schema import Schema, TensorSpec, flatten, unflatten

STATE = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a.scale": torch.tensor(7.0),
    "c.empty": torch.empty(0, 4),
    "b.bias": torch.tensor([8.0, 9.0]),
}


def test_the_order_is_that_of_the_names_and_not_of_the_state():
    schema = Schema.of(STATE)
    assert [spec.name for spec in schema.tensors] == ["a.scale", "b.bias", "b.weight", "c.empty"]
    assert schema.numel == 1 + 2 + 6 + 0
    assert flatten(STATE, schema).tolist() == [7, 8, 9, 0, 1, 2, 3, 4, 5]
    assert Schema.of(dict(reversed(STATE.items()))) == schema


def test_unflatten_gives_views_with_the_shapes():
    schema = Schema.of(STATE)
    flat = flatten(STATE, schema)
    back = unflatten(flat, schema)
    assert back.keys() == STATE.keys()
    assert all(torch.equal(back[name], STATE[name]) for name in STATE)
    flat += 1
    assert torch.equal(back["b.weight"], STATE["b.weight"] + 1)


def test_flatten_copies():
    schema = Schema.of(STATE)
    flatten(STATE, schema).fill_(-1)
    assert STATE["a.scale"] == 7


def test_digest_is_that_of_the_documented_json():
    schema = Schema.of({"b": torch.zeros(2, 3), "a": torch.zeros(())})
    text = '{"tensors":[{"name":"a","shape":[]},{"name":"b","shape":[2,3]}]}'
    assert schema.digest == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(text) == json.loads(schema.model_dump_json())


def test_every_change_changes_the_digest():
    one = Schema.of({"a": torch.zeros(2, 3)})
    others = [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(6)}, {}]
    digests = {one.digest, *(Schema.of(state).digest for state in others)}
    assert len(digests) == 5


def test_nothing_shared_is_an_empty_buffer():
    schema = Schema.of({})
    assert flatten({}, schema).shape == (0,)
    assert unflatten(torch.empty(0), schema) == {}


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({**STATE, "d": torch.zeros(1)}, "d"),
        ({"a.scale": torch.tensor(1.0)}, "b.weight"),
        ({**STATE, "b.bias": torch.zeros(1, 2)}, "b.bias"),
        ({**STATE, "b.bias": torch.zeros(1)}, "b.bias"),
        ({**STATE, "b.bias": torch.zeros(2, dtype=torch.float64)}, "float64"),
    ],
)
def test_flatten_refuses_what_is_not_the_schema(state, named):
    with pytest.raises(ExchangeError, match=named):
        flatten(state, Schema.of(STATE))


@pytest.mark.parametrize(
    "flat", [torch.zeros(8), torch.zeros(10), torch.zeros(9, 1), torch.zeros(9).double()]
)
def test_unflatten_refuses_another_length_or_type(flat):
    with pytest.raises(ExchangeError, match=r"\(9,\) torch.float32"):
        unflatten(flat, Schema.of(STATE))


def test_only_float32_can_be_shared():
    with pytest.raises(ExchangeError, match=r"counter: is torch\.int64"):
        Schema.of({"counter": torch.tensor(1)})


def test_a_schema_is_sorted_and_has_no_duplicates():
    a, b = TensorSpec(name="a", shape=(1,)), TensorSpec(name="b", shape=(1,))
    for tensors in ((b, a), (a, a)):
        with pytest.raises(ValueError, match="sorted by name"):
            Schema(tensors=tensors)
