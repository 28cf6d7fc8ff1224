"""A dry run says what the first round sends, byte for byte, and reaches no network."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
from typing import Any

import pytest
from rich.console import Console

from tests.support.tiny import tiny_study, write_folder
from uharmony_client import dry_run as module
from uharmony_client.dry_run import NetworkUsedError, dry_run, no_network, render
from uharmony_client.local_train import train_round
from uharmony_client.policy import Policy, apply_policy
from uharmony_client.site import Site
from uharmony_client.site_config import SiteConfig
from uharmony_model.errors import ConfigError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import Kind, digest, encode
from uharmony_model.exchange.schema import unflatten
from uharmony_model.initial import initial_local, initial_weights
from uharmony_model.networks import build_network

STUDY = tiny_study(codec={"up": "bf16"})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "data", {"alpha": 5})


def opened(data, tmp_path, study=STUDY, **policy):
    config = SiteConfig(name="alpha", cases=data, store=tmp_path / "store", policy=Policy(**policy))
    config = config.model_copy(
        update={"resources": config.resources.model_copy(update={"device": "cpu"})}
    )
    return Site.open(config, study)


def first_round(site) -> tuple[bytes, Partition, dict[str, Any]]:
    """The update of round 1, put together as a round is."""
    study = site.study
    schema, base = initial_weights(study)
    network = build_network(study, site.domains, seed=study.seed)
    partition = Partition.of(network, study.plan.local)
    data = site.training_data()
    result = train_round(
        network,
        data,
        study=study,
        partition=partition,
        base=base,
        before=initial_local(study, site.domains),
        round_=1,
    )
    flat = apply_policy(result.update, site.config.policy)
    sent = encode(
        kind=Kind.UPDATE,
        study=study.digest,
        round=1,
        site=site.name,
        base=digest(base),
        codec=study.codec.up,
        schema=schema,
        flat=flat,
        values={"cases": len(data.volumes), "loss": result.loss, "started_from": 0},
    )
    half = flat.bfloat16().float()
    return sent, partition, unflatten(half, schema)


def test_it_says_what_the_first_round_sends(data, tmp_path):
    site = opened(data, tmp_path, min_cases=1, clip_norm=0.05)
    before = sorted(site.config.store.rglob("*"))
    found = dry_run(site)
    sent, partition, tensors = first_round(site)
    assert (found.bytes, found.sha256) == (len(sent), hashlib.sha256(sent).hexdigest())
    assert [t.name for t in found.tensors] == list(partition.shared_keys)
    for fact in found.tensors:
        raw = tensors[fact.name].numpy().astype("<f4").tobytes()
        assert (fact.bytes, fact.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert set(partition.local_names) <= set(found.stays)
    assert not {t.name for t in found.tensors} & set(found.stays)
    assert found.all_steps
    assert sorted(site.config.store.rglob("*")) == before  # nothing is stored


def test_a_shorter_one_says_so_and_small_numbers_stay(data, tmp_path):
    found = dry_run(opened(data, tmp_path), steps=1)
    assert (found.steps, found.all_steps) == (1, False)
    assert found.values == {"cases": "equal", "loss": None, "started_from": 0}
    assert json.loads(found.to_json())["sha256"] == found.sha256
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render(found))
    assert found.sha256 in shown.get()
    assert "shorter than a round" in shown.get()
    assert all(fact.sha256[:16] in shown.get() for fact in found.tensors)


def test_a_study_beyond_the_policy_is_refused_before_anything_is_trained(data, tmp_path):
    with pytest.raises(ConfigError, match="polynomial"):
        dry_run(opened(data, tmp_path, share=("backbone",)))


def test_whoever_reaches_for_the_network_meanwhile_fails(data, tmp_path, monkeypatch):
    def reach(*_: object, **__: object) -> None:
        socket.create_connection(("127.0.0.1", 9))

    monkeypatch.setattr(module, "train_round", reach)
    with pytest.raises(NetworkUsedError):
        dry_run(opened(data, tmp_path))


def test_no_way_to_a_socket_is_left_and_all_are_back_afterwards():
    taken = socket.socket  # as a module keeps it that was imported before
    with taken() as ready:
        with no_network():
            for reach in (
                lambda: socket.socket(),
                lambda: socket.create_connection(("127.0.0.1", 9)),
                lambda: socket.getaddrinfo("localhost", 9),
                lambda: ready.connect(("127.0.0.1", 9)),
                lambda: ready.connect_ex(("127.0.0.1", 9)),
            ):
                with pytest.raises(NetworkUsedError):
                    reach()
        assert ready.connect_ex(("127.0.0.1", 9)) != 0  # nobody listens there, but it is asked
    assert socket.socket is taken
    assert issubclass(ssl.SSLSocket, socket.socket)
    assert socket.getaddrinfo("127.0.0.1", 9)
