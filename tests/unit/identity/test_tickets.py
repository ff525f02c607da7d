"""Tickets as strings: whole or refused, and never shown by accident."""

from __future__ import annotations

import logging

import base58
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest, PyAgentError, Refused, Unsupported
from pyagent_node.native import blake3
from pyagent_node.node.home import Home
from pyagent_node.node.identity import NodeKey, seal, sealed_payload
from pyagent_node.node.profiles import MeshProfile, create_mesh
from pyagent_node.node.tickets import (
    MAX_SECONDS,
    Ticket,
    issue_ticket,
    open_ticket,
    parse_ticket,
    prove,
    secret_of,
)

NOW = 1_800_000_000
KIND = b"pyagent-node ticket v1\0"


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> MeshProfile:
    home = Home(tmp_path_factory.mktemp("owner"))
    return create_mesh(home, "home", "private", node_name="ann", clock=lambda: NOW)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> MeshProfile:
    home = Home(tmp_path_factory.mktemp("public"))
    return create_mesh(home, "square", "public", node_name="ann", clock=lambda: NOW)


def addresses(profile: MeshProfile) -> list[str]:
    return [f"/ip4/192.0.2.7/tcp/4810/p2p/{profile.genesis.writer}"]


@pytest.fixture(scope="module")
def ticket(owner: MeshProfile) -> Ticket:
    return issue_ticket(owner, role="learner", seconds=3600, addresses=addresses(owner), now=NOW)


def test_holds_all_a_stranger_needs(owner: MeshProfile, ticket: Ticket) -> None:
    assert ticket.text.startswith("pyagent1")
    assert ticket.text.isalnum()
    read = parse_ticket(ticket.text)
    assert read == ticket
    assert read.genesis == owner.genesis
    assert read.psk == owner.psk
    assert list(read.addresses) == addresses(owner)
    assert read.expires == NOW + 3600
    assert owner.authority_key is not None
    assert read.secret == secret_of(
        owner.authority_key, bytes.fromhex(read.id), "learner", NOW + 3600
    )
    assert not read.open


def test_white_space_of_a_paste_is_ignored(ticket: Ticket) -> None:
    wrapped = "\n  ".join(ticket.text[i : i + 40] for i in range(0, len(ticket.text), 40))
    assert parse_ticket(f"  {wrapped}\r\n") == ticket


def test_never_shown(ticket: Ticket, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("x").warning("%s %r", ticket, ticket)
    assert ticket.psk is not None
    for shown in (repr(ticket), str(ticket), f"{ticket}", caplog.text, repr([ticket])):
        assert ticket.text not in shown
        assert ticket.psk.hex() not in shown
        assert repr(ticket.psk) not in shown
        assert repr(ticket.secret) not in shown
        assert ticket.id not in shown


@given(st.data())
def test_any_truncation_is_malformed(ticket: Ticket, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(ticket.text) - 1))
    with pytest.raises(InvalidRequest) as caught:
        parse_ticket(ticket.text[:cut])
    assert caught.value.code == "ticket_malformed"


@given(st.data())
def test_any_typo_is_malformed(ticket: Ticket, data: st.DataObject) -> None:
    at = data.draw(st.integers(8, len(ticket.text) - 1))
    letter = data.draw(st.sampled_from("123456789ABCDEFGHJKLMNPQRSTUVWXYZabc0OIl-_é"))
    text = ticket.text[:at] + letter + ticket.text[at + 1 :]
    if text != ticket.text:
        with pytest.raises(InvalidRequest) as caught:
            parse_ticket(text)
        assert caught.value.code == "ticket_malformed"
        assert ticket.text[8:30] not in str(caught.value)


@given(st.text(max_size=100))
def test_garbage(text: str) -> None:
    for candidate in (text, "pyagent1" + text):
        with pytest.raises((InvalidRequest, Unsupported)):
            parse_ticket(candidate)


@pytest.mark.parametrize(
    "text", ["", "pyagent1", "pyagent", "p" * 100_000, "pyagent1" + "z" * 5000]
)
def test_sizes(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_ticket(text)
    assert caught.value.code == "ticket_malformed"


def test_other_version() -> None:
    with pytest.raises(Unsupported) as caught:
        parse_ticket("pyagent2abcdef")
    assert caught.value.code == "ticket_version"


def remade(ticket: Ticket, key: NodeKey, **changes: object) -> str:
    """Return the ticket with its statement changed, signed by ``key``, checksum right."""
    data = base58.b58decode(ticket.text[8:])[:-5]
    fields = dict(
        zip(
            ("genesis", "psk", "addresses", "id", "secret", "role", "expires"),
            msgspec.msgpack.decode(sealed_payload(data)),
            strict=True,
        )
    )
    fields.update(changes)
    sealed = seal(key, KIND, msgspec.msgpack.encode(list(fields.values())))
    return "pyagent1" + base58.b58encode(sealed + blake3(KIND + sealed)[:5]).decode()


def test_forged(owner: MeshProfile, ticket: Ticket) -> None:
    assert owner.authority_key is not None
    assert parse_ticket(remade(ticket, owner.authority_key)) == ticket
    for changes in ({}, {"expires": NOW + 10**7}, {"role": "voter"}, {"psk": bytes(32)}):
        with pytest.raises(Refused) as caught:
            parse_ticket(remade(ticket, NodeKey.generate(), **changes))
        assert caught.value.code == "ticket_forged"


@pytest.mark.parametrize(
    "changes",
    [
        {"psk": None},
        {"psk": b"short"},
        {"secret": b"short"},
        {"secret": b""},
        {"id": b""},
        {"role": "king"},
        {"addresses": []},
        {"addresses": ["/ip4/192.0.2.7/tcp/1"]},
        {"addresses": ["x" * 1000]},
        {"addresses": [f"/ip4/192.0.2.7/tcp/1/p2p/{NodeKey(bytes(32)).peer_id}"]},
        {"genesis": b"x"},
        {"expires": "soon"},
    ],
)
def test_signed_nonsense(owner: MeshProfile, ticket: Ticket, changes: dict[str, object]) -> None:
    assert owner.authority_key is not None
    with pytest.raises(PyAgentError) as caught:
        parse_ticket(remade(ticket, owner.authority_key, **changes))
    assert caught.value.code == "ticket_malformed"


def test_expiry(ticket: Ticket) -> None:
    ticket.check_expiry(NOW + 3599)
    with pytest.raises(Refused) as caught:
        ticket.check_expiry(NOW + 3600)
    assert caught.value.code == "ticket_expired"


def test_only_the_authority_issues(owner: MeshProfile) -> None:
    member = MeshProfile(owner.genesis, name="bob", role="learner", psk=owner.psk, certificate=b"x")
    with pytest.raises(Refused) as caught:
        issue_ticket(member, role="learner", seconds=3600, addresses=addresses(owner), now=NOW)
    assert caught.value.code == "not_authority"
    assert owner.genesis.writer in str(caught.value)


@pytest.mark.parametrize("seconds", [0, -1, 59, MAX_SECONDS + 1, float("nan"), float("inf")])
def test_lifetimes(owner: MeshProfile, seconds: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        issue_ticket(owner, role="learner", seconds=seconds, addresses=addresses(owner), now=NOW)
    assert caught.value.code == "bad_ttl"


def test_needs_an_address(owner: MeshProfile) -> None:
    other = [f"/ip4/192.0.2.7/tcp/1/p2p/{NodeKey(bytes(32)).peer_id}"]
    for wrong in ([], other):
        with pytest.raises(InvalidRequest) as caught:
            issue_ticket(owner, role="learner", seconds=60, addresses=wrong, now=NOW)
        assert caught.value.code == "no_address"


def test_open_tickets(owner: MeshProfile, public: MeshProfile) -> None:
    ticket = open_ticket(public, role="learner", seconds=60, addresses=addresses(public), now=NOW)
    assert ticket.open
    assert ticket.psk is None
    assert parse_ticket(ticket.text) == ticket
    for profile, role in ((owner, "learner"), (public, "voter")):
        with pytest.raises(InvalidRequest):
            open_ticket(profile, role=role, seconds=60, addresses=addresses(profile), now=NOW)  # type: ignore[arg-type]
    voter = issue_ticket(public, role="voter", seconds=60, addresses=addresses(public), now=NOW)
    assert not voter.open


def test_proof_depends_on_everything(owner: MeshProfile, public: MeshProfile) -> None:
    a, b = NodeKey(b"a" * 32).peer_id, NodeKey(b"b" * 32).peer_id
    base = {"genesis": owner.genesis, "ticket_id": "0", "joiner": a, "server": b, "nonce": b"n"}
    variants = [
        base,
        base | {"genesis": public.genesis},
        base | {"ticket_id": "1"},
        base | {"joiner": b},
        base | {"server": a},
        base | {"nonce": b"m"},
    ]
    proofs = {prove(b"s" * 16, **v) for v in variants} | {prove(b"t" * 16, **base)}  # type: ignore[arg-type]
    assert len(proofs) == 7
