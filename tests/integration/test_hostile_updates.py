"""Bad updates and connections at the coordinator: refused with a reason, nothing else moves.

The cases and what Flower's own aggregation does with them are in benchmarks/hostile_cases.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.hostile import BASE, HONEST, HOSTILE, delta_of, flower_round, our_round
from benchmarks.hostile_cases import cases
from benchmarks.hostile_forms import Case, carried, fedavg
from tests.integration.test_gateway import node_headers, node_key
from tests.support.gateway import PULL, PUSH_OBJECT, FakeSuperLink, Town, read_all, town
from uharmony_client.identity import Identity
from uharmony_server.admission import RefusalReason

ROOT = Path(__file__).resolve().parent.parent.parent
MARKER = Path("/nonexistent/uharmony/executed")  # cases are named without being run
NAMES = [f"{case.number} {case.name}" for case in cases(MARKER)]
_GROWTH = 64 << 20


@pytest.fixture(scope="module")
def without() -> torch.Tensor:
    """The weights after the same rounds when the hostile site is away in the second one."""
    return our_round(None).weights


def mean_of(*second: tuple[float, ...]) -> torch.Tensor:
    """Two rounds in float64; all sites have 12 cases. `second` are the deltas of round 2."""
    weights = BASE.double()
    first = [delta_of(site, 1) for site in (*HONEST, HOSTILE)]
    for deltas in (first, second):
        weights = weights + torch.tensor(deltas, dtype=torch.float64).mean(0)
    return weights


def honest_two() -> list[tuple[float, ...]]:
    return [delta_of(site, 2) for site in HONEST]


def test_the_round_without_the_hostile_site_is_the_mean_of_the_others(without):
    assert torch.allclose(without.double(), mean_of(*honest_two()), rtol=1e-5, atol=1e-6)


def test_an_honest_third_site_is_counted_and_moves_the_weights(without):
    found = our_round(lambda asked: carried(asked.payload()))
    assert found.refusals == ()
    assert not torch.equal(found.weights, without)


@pytest.mark.parametrize("name", NAMES)
def test_the_round_goes_on_without_a_bit_of_it(name: str, without: torch.Tensor, tmp_path: Path):
    marker = tmp_path / "executed"
    case = _case(name, marker)
    found = our_round(case.ours, twice=case.twice)
    assert not marker.exists()
    if case.reason is None or case.twice:
        return  # admitted ones have tests of their own
    assert [(r.site, r.round, r.reason) for r in found.refusals] == [(HOSTILE, 2, case.reason)]
    assert found.refusals[0].detail.isprintable()
    assert "mkdir" not in found.refusals[0].detail  # nothing of a pickle gets into a log
    assert torch.equal(found.weights, without)


def _case(name: str, marker: Path) -> Case:
    return next(case for case in cases(marker) if f"{case.number} {case.name}" == name)


@pytest.mark.parametrize(
    ("name", "factor", "shift"),
    [("3 denormal numbers only", 0.0, 1e-42), ("5 sign flipped, times 10", -10.0, 0.0)],
)
def test_what_is_admitted_has_its_share_and_no_more(name: str, factor: float, shift: float):
    found = our_round(_case(name, MARKER).ours)
    assert found.refusals == ()
    sent = tuple(factor * d + shift for d in delta_of(HOSTILE, 2))
    wanted = mean_of(*honest_two(), sent)
    assert torch.allclose(found.weights.double(), wanted, rtol=1e-5, atol=1e-6)


def test_an_answer_sent_twice_counts_once():
    case = _case("20 the same answer twice", MARKER)
    once, twice = our_round(case.ours), our_round(case.ours, twice=True)
    assert [(r.site, r.reason) for r in twice.refusals] == [(HOSTILE, RefusalReason.DUPLICATE)]
    assert torch.equal(once.weights, twice.weights)
    wanted = mean_of(*honest_two(), delta_of(HOSTILE, 2))
    assert torch.allclose(twice.weights.double(), wanted, rtol=1e-5, atol=1e-6)


def test_all_numbers_of_the_list_are_there():
    numbers = {case.number for case in cases(MARKER)}
    assert {str(n) for n in range(1, 25)} <= numbers


def test_flowers_own_aggregation_is_really_run():
    base = BASE
    assert "hold NaN" in flower_round(base, _case("1 one NaN", MARKER).flower)
    assert flower_round(base, None).startswith("counted; moves the weights by 0 ")
    once = flower_round(base, lambda asked: fedavg(asked.arrays()))
    assert once != flower_round(base, lambda asked: fedavg(asked.arrays()), twice=True)


def test_the_table_in_the_documentation_is_what_happens():
    text = (ROOT / "docs" / "hostile_input.md").read_text()
    for case in cases(MARKER):
        verdict = "admitted" if case.reason is None else f"refused: {case.reason.value}"
        assert f"| {case.number} | {case.name} | {verdict}" in text


# --- on the way in: 20, 21 and 22 at a real gateway ----------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Town, Identity, Identity]]:
    path = tmp_path_factory.mktemp("hostile")
    limits = {
        "header_seconds": 1.0, "idle_seconds": 2.0,
        "max_connections": 64, "max_connections_per_address": 16,
    }  # fmt: skip
    with town(path, **limits) as here:
        superlink = FakeSuperLink(here.folder, here.upstream_port)
        yield here, here.join("north", path / "north"), here.join("valley", path / "valley")
        superlink.close()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_20_a_recorded_request_is_of_no_use_to_others(place):
    here, north, valley = place
    recorded = {**node_headers(north), "flwr-timestamp": "t", "flwr-signature": "s"}
    assert here.call(north.context(), PULL, b"x", recorded).status == 200
    for context, reason in (
        (here.anonymous(), b'"no-certificate"'),
        (valley.context(), b'"wrong-node-key"'),
    ):
        answer = here.call(context, PULL, b"x", recorded)
        assert answer.status == 401
        assert reason in answer.body


@pytest.mark.alone
@pytest.mark.parametrize("path", [PUSH_OBJECT, "/v1/uharmony/enrol"])
def test_21_two_gibibytes_before_authentication(place, path: str):
    here, north, _ = place
    before, sent, block = resident(), 0, bytes(1 << 20)
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {2**31}\r\n\r\n"
    with here.connect(here.anonymous()) as connection:
        connection.settimeout(4)
        connection.sendall(head.encode())
        answer = connection.recv(4096)  # before a byte of the body
        with contextlib.suppress(OSError):
            for _ in range(2048):
                connection.sendall(block)
                sent += len(block)
    assert answer[:12] in (b"HTTP/1.1 401", b"HTTP/1.1 413")
    assert sent < 64 << 20  # what kernels and TLS buffer, far from 2 GiB
    assert resident() - before < _GROWTH
    assert here.call(north.context(), PULL, b"x", node_headers(north)).status == 200


@pytest.mark.alone
def test_22_headers_that_never_end(place):
    here, north, _ = place
    slow = [here.connect(here.anonymous()) for _ in range(8)]
    started, before = time.monotonic(), here.gateway.shared.refusals["slow-header"]
    end = started + 5

    def dribble(connection: ssl.SSLSocket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(b"POST / HTTP/1.1\r\nhost: a\r\n")
            while time.monotonic() < end:
                connection.sendall(b"x")
                time.sleep(0.1)

    threads = [threading.Thread(target=dribble, args=(s,), daemon=True) for s in slow]
    for thread in threads:
        thread.start()
    answer = here.call(north.context(), PULL, b"x", node_headers(north))
    assert answer.status == 200
    assert time.monotonic() - started < 1
    ended = wait_until(lambda: here.gateway.shared.refusals["slow-header"] - before == 8, 4)
    assert ended, here.gateway.shared.refusals
    for connection in slow:
        connection.close()
    for thread in threads:
        thread.join(6)


@pytest.mark.alone
@pytest.mark.slow
def test_22_ten_thousand_idle_connections(place):
    """From one address: at most 16 are held, the hospital beside them is served."""
    here, north, _ = place
    assert wait_until(lambda: here.gateway._places.taken == 0, 5)
    before, most, kept = resident(), 0, []
    refused = here.gateway.shared.refusals["too-many-connections"]
    for number in range(10_000):
        with contextlib.suppress(OSError):
            one = socket.create_connection(
                ("127.0.0.1", here.port), timeout=2, source_address=("127.0.0.2", 0)
            )
            kept.append(one)
        if len(kept) > 300:
            kept.pop(16).close()  # the first ones stay
        most = max(most, here.gateway._places.taken)
        if number == 5000:
            started = time.monotonic()
            assert here.call(north.context(), PULL, b"x", node_headers(north)).status == 200
            assert time.monotonic() - started < 3
    assert 16 <= most <= 17  # and the hospital's own
    assert here.gateway.shared.refusals["too-many-connections"] - refused > 9000
    assert resident() - before < _GROWTH
    for connection in kept:
        connection.close()
    assert wait_until(lambda: here.gateway._places.taken == 0, 8)


@pytest.mark.alone
def test_22_idle_without_a_word(place):
    here, _, _ = place
    with here.connect(here.anonymous()) as silent:
        silent.settimeout(5)
        started = time.monotonic()
        assert read_all(silent) == b""
        assert time.monotonic() - started < 3


def test_limits_hold_for_a_site_too(place):
    """A known site may stay idle, not stop in the middle of a header."""
    here, north, _ = place
    with here.connect(north.context()) as connection:
        connection.settimeout(5)
        connection.sendall(f"POST {PULL} HTTP/1.1\r\nflwr-public-key: {node_key(north)}".encode())
        started = time.monotonic()
        assert read_all(connection).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 4
