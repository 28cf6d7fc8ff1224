from __future__ import annotations

import asyncio

import pytest

from uharmony_service.loopback import (
    SECRET_HEADER,
    free_port,
    guarded,
    read_secret,
    write_secret,
)


def call(headers, kind="http"):
    """Status that the guarded app gives, and whether the app behind it was reached."""
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["type"])

    async def send(message):
        sent.append(message)

    async def run():
        scope = {"type": kind, "headers": headers}
        await guarded(app, "s3cret")(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(run())
    return [m["status"] for m in sent if "status" in m], reached


def test_the_secret_opens():
    assert call([(SECRET_HEADER.encode(), b"s3cret")]) == ([], ["http"])


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(SECRET_HEADER.encode(), b"")],
        [(SECRET_HEADER.encode(), b"s3crets")],
        [(SECRET_HEADER.encode(), b"s3cret"), (SECRET_HEADER.encode(), b"s3cret")],
        [(b"authorization", b"s3cret")],
    ],
)
def test_without_it_nothing_is_reached(headers):
    assert call(headers) == ([403], [])


def test_the_start_of_the_app_is_let_through():
    assert call([], kind="lifespan") == ([], ["lifespan"])


def test_each_start_draws_another_secret_for_this_user_alone(tmp_path):
    path = tmp_path / "run" / "secret"
    write_secret(path)
    first = read_secret(path)
    write_secret(path)
    assert read_secret(path) != first
    assert len(first) >= 40
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_free_port_can_be_opened():
    assert 1024 <= free_port() <= 65535
