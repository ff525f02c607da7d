"""Mesh genesis and membership certificates."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, InvalidRequest, Refused
from pyagent_node.base.types import Digest
from pyagent_node.node.certificates import (
    CLOCK_SKEW,
    DAY,
    Certificate,
    issue,
    read_certificate,
    verify_certificate,
)
from pyagent_node.node.genesis import Genesis, check_name, decode_genesis, new_genesis
from pyagent_node.node.identity import NodeKey, seal

AUTHORITY, NODE, OTHER = (NodeKey(bytes([n]) * 32) for n in (1, 2, 3))
NOW = 1_800_000_000


def genesis(**changes: object) -> Genesis:
    fields: dict[str, object] = {
        "authority": AUTHORITY.peer_id,
        "writer": NODE.peer_id,
        "created": NOW,
        "nonce": bytes(16),
    }
    return new_genesis("home", "private", **{**fields, **changes})  # type: ignore[arg-type]


def certificate(**changes: object) -> Certificate:
    plain = Certificate(genesis().mesh_id, NODE.peer_id, "ann", "learner", NOW, NOW + DAY)
    return msgspec.structs.replace(plain, **changes)


def refusal(data: bytes, *, now: float = NOW, peer: NodeKey = NODE) -> str:
    with pytest.raises(Refused) as caught:
        verify_certificate(data, genesis(), peer.peer_id, now)
    assert caught.value.remedy
    return caught.value.code


def test_mesh_id_is_stable_and_depends_on_every_field() -> None:
    assert genesis().mesh_id == "5e373131c00b00dca3a3e33bccbf98825be75fbe74e1ad5a7043c46056dac528"
    variants = [
        genesis(nonce=bytes(15) + b"x"),
        genesis(created=NOW + 1),
        genesis(authority=OTHER.peer_id),
        genesis(writer=OTHER.peer_id),
        genesis(engine="raft-rs"),
        new_genesis(
            "home",
            "public",
            authority=AUTHORITY.peer_id,
            writer=NODE.peer_id,
            created=NOW,
            nonce=bytes(16),
        ),
    ]
    assert len({g.mesh_id for g in [genesis(), *variants]}) == 7
    assert len({g.fingerprint for g in [genesis(), *variants]}) == 7
    assert decode_genesis(genesis().encode()) == genesis()


@given(data=st.binary(max_size=300))
def test_garbage_is_no_genesis(data: bytes) -> None:
    with pytest.raises(CorruptData) as caught:
        decode_genesis(data)
    assert caught.value.code == "bad_genesis"


def test_only_the_canonical_encoding_is_taken() -> None:
    g = genesis()
    loose = msgspec.msgpack.encode(
        [g.name, g.visibility, g.authority, g.writer, g.engine, float(g.created), g.nonce]
    )
    for data in (loose, g.encode() + b"\0", g.encode()[:-1], b"\xdc\x00\x07" + g.encode()[1:]):
        with pytest.raises(CorruptData):
            decode_genesis(data)


@pytest.mark.parametrize(
    "name", ["", "-x", "a b", "a\nb", "x" * 64, "a/b", "\u202eevil", "a\0", "é" * 64, "🦊"]
)
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name, "a mesh")


@pytest.mark.parametrize("name", ["home", "büro", "мир", "a.b_c-d", "家"])
def test_good_names(name: str) -> None:
    assert check_name(name, "a mesh") == name


def test_good_certificate() -> None:
    data = issue(AUTHORITY, certificate())
    assert verify_certificate(data, genesis(), NODE.peer_id, NOW) == certificate()
    assert verify_certificate(data, genesis(), NODE.peer_id, NOW - CLOCK_SKEW)
    assert verify_certificate(data, genesis(), NODE.peer_id, NOW + DAY - 1)
    assert read_certificate(data) == certificate()


def test_refused_certificates_by_name() -> None:
    good = issue(AUTHORITY, certificate())
    assert refusal(b"") == "no_certificate"
    assert refusal(good, now=NOW + DAY) == "certificate_expired"
    assert refusal(good, now=NOW - CLOCK_SKEW - 1) == "certificate_not_yet_valid"
    assert refusal(good, peer=OTHER) == "certificate_forged"
    assert refusal(issue(OTHER, certificate())) == "certificate_forged"
    assert refusal(issue(AUTHORITY, certificate(mesh_id=Digest("0" * 64)))) == "wrong_mesh"
    assert refusal(seal(AUTHORITY, b"x\0", b"not a certificate")) == "certificate_forged"
    assert refusal(b"\x93" + good[1:]) == "certificate_forged"
    assert refusal(good + bytes(2000)) == "certificate_forged"


def test_signature_of_another_kind_is_no_certificate() -> None:
    payload = msgspec.msgpack.encode(certificate())
    assert refusal(seal(AUTHORITY, b"pyagent-node ticket v1\0", payload)) == "certificate_forged"


@given(st.data())
def test_every_changed_byte_is_refused(data: st.DataObject) -> None:
    sealed = bytearray(issue(AUTHORITY, certificate()))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    assert refusal(bytes(sealed)) in ("certificate_forged", "wrong_mesh")


@given(data=st.binary(min_size=1, max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    assert refusal(data) == "certificate_forged"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"role": "king"},
        {"expires": NOW},
        {"expires": NOW + 4000 * DAY},
        {"issued": -1},
        {"peer_id": "nobody"},
    ],
)
def test_nonsense_is_not_issued(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        issue(AUTHORITY, certificate(**changes))
