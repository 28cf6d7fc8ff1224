"""A join code is read back exactly, and nothing else is taken for one."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uharmony_model.errors import ConfigError
from uharmony_model.exchange.joining import JoinCode

CODE = JoinCode(address="fed.example.org:8443", ca_sha256="ab" * 32, token="A" * 43, expires=1)
codes = st.builds(
    JoinCode,
    address=st.from_regex(r"[a-z][a-z0-9-]{0,20}[a-z]:[1-9][0-9]{0,3}", fullmatch=True),
    ca_sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    token=st.from_regex(r"[A-Za-z0-9_-]{43}", fullmatch=True),
    expires=st.integers(0, (1 << 40) - 1),
)


@given(codes)
def test_round_trip(code: JoinCode):
    text = code.to_text()
    assert text.startswith("UH1.")
    assert text.isascii()
    assert not set(text) & set(" \n\t=+/\"'$&;")
    assert JoinCode.from_text(f" {text}\n") == code


@given(st.text(max_size=200) | st.text("UH1.eyJ_-=\n", max_size=60).map(lambda t: "UH1." + t))
def test_garbage_is_refused(text: str):
    with pytest.raises(ConfigError):
        JoinCode.from_text(text)


@given(st.integers(0, len(CODE.to_text()) - 1), st.sampled_from("AQgwZz09-_.=+/ \n"))
def test_one_wrong_character_is_refused_or_gives_another_code(place: int, letter: str):
    text = CODE.to_text()
    changed = text[:place] + letter + text[place + 1 :]
    if changed.strip() == text:
        return
    try:
        read = JoinCode.from_text(changed)
    except ConfigError:
        return
    # Letters inside the token or the digest may make a code that opens nothing.
    assert read != CODE
    assert read.to_text() == changed.strip()


@given(st.integers(0, len(CODE.to_text()) - 1))
def test_a_code_cut_short_is_refused(length: int):
    with pytest.raises(ConfigError):
        JoinCode.from_text(CODE.to_text()[:length])


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"[" * 700,
        b'{"address":"a:1","ca_sha256":"' + b"0" * 64 + b'","expires":1,"token":1}',
        b'{"address":"a:1","ca_sha256":"' + b"0" * 64 + b'","expires":1,"x":1,"token":"'
        + b"A" * 43 + b'"}',
        b'{"address":"a:1@b","ca_sha256":"' + b"0" * 64 + b'","expires":1,"token":"'
        + b"A" * 43 + b'"}',
    ],
)  # fmt: skip
def test_other_content_is_refused(content: bytes):
    text = "UH1." + base64.urlsafe_b64encode(content).rstrip(b"=").decode()
    with pytest.raises(ConfigError):
        JoinCode.from_text(text)


def test_the_message_does_not_show_the_token():
    text = CODE.to_text()[:-3]
    with pytest.raises(ConfigError) as error:
        JoinCode.from_text(text)
    assert text[10:30] not in str(error.value)
