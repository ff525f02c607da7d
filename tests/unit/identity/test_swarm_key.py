"""The standard ``swarm.key`` file."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData
from pyagent_node.node.swarm_key import format_swarm_key, new_psk, parse_swarm_key

HEAD = b"/key/swarm/psk/1.0.0/\n"
PSK = bytes(range(32))


def test_standard_form() -> None:
    assert format_swarm_key(PSK) == HEAD + b"/base16/\n" + PSK.hex().encode() + b"\n"


@given(st.binary(min_size=32, max_size=32))
def test_round_trip(psk: bytes) -> None:
    assert parse_swarm_key(format_swarm_key(psk)) == psk
    assert parse_swarm_key(HEAD + b"/base64/\n" + base64.b64encode(psk) + b"\n") == psk
    assert parse_swarm_key(HEAD + b"/bin/\n" + psk) == psk
    assert parse_swarm_key(format_swarm_key(psk).replace(b"\n", b"\r\n")) == psk
    assert (
        parse_swarm_key(
            format_swarm_key(psk)
            .upper()
            .replace(HEAD.upper(), HEAD)
            .replace(b"/BASE16/", b"/base16/")
        )
        == psk
    )


def test_new_keys_differ() -> None:
    assert len(new_psk()) == 32
    assert new_psk() != new_psk()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        HEAD,
        HEAD + b"/base16/",
        HEAD + b"/base16/\n",
        HEAD + b"/base16/\n" + b"zz" * 32,
        HEAD + b"/base16/\n" + b"00" * 31,
        HEAD + b"/base16/\n" + b"00" * 33,
        HEAD + b"/base64/\n!!!",
        HEAD + b"/base85/\n" + b"00" * 32,
        HEAD + b"/bin/\n" + b"0" * 34,
        b"/key/swarm/psk/2.0.0/\n/base16/\n" + b"00" * 32,
        b"\0" * 100,
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(CorruptData) as caught:
        parse_swarm_key(data)
    assert caught.value.code == "bad_swarm_key"


def test_errors_do_not_show_the_key() -> None:
    with pytest.raises(CorruptData) as caught:
        parse_swarm_key(HEAD + b"/base16/\n" + b"deadbeef" * 9)
    assert "deadbeef" not in repr(caught.value.to_info())
    with pytest.raises(CorruptData):
        format_swarm_key(b"short")
