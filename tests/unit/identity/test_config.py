"""Settings: precedence, sources, and errors that say what to write instead."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import ConfigError, InvalidRequest
from pyagent_node.node.addresses import check_address, peer_of, without_peer
from pyagent_node.node.config import Settings, change_setting, host_name, load_settings
from pyagent_node.node.home import Home
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.options import OPTIONS

PEER = NodeKey(bytes(32)).peer_id


@pytest.fixture
def empty(tmp_path: Path) -> Home:
    return Home(tmp_path)


def write(home: Home, text: str) -> None:
    home.config_path.parent.mkdir(parents=True, exist_ok=True)
    home.config_path.write_text(text)


def test_every_option_is_a_field_and_its_default_is_allowed(empty: Home) -> None:
    settings = load_settings(empty, environ={})
    assert {o.key for o in OPTIONS} == set(Settings.__struct_fields__) - {"sources"}
    for option in OPTIONS:
        assert option.parse(option.default) == getattr(settings, option.key)
        assert settings.sources[option.key] == "default"
        assert option.help
        assert option.allowed


def test_precedence_and_sources(empty: Home) -> None:
    write(empty, 'n_ctx = 100\nn_seq = 2\nname = "file"\n')
    environ = {"PYAGENT_N_SEQ": "3", "PYAGENT_NAME": "env", "PYAGENT_UNRELATED": "x"}
    settings = load_settings(empty, flags={"name": "flag", "mdns": None}, environ=environ)
    assert (settings.n_ctx, settings.n_seq, settings.name, settings.mdns) == (100, 3, "flag", True)
    sources = {s.key: s.source for s in settings.show()}
    assert sources["n_ctx"] == str(empty.config_path)
    assert sources["n_seq"] == "PYAGENT_N_SEQ"
    assert sources["name"] == "flag"
    assert sources["mdns"] == "default"
    assert [s.key for s in settings.show()] == [o.key for o in OPTIONS]


GOOD = [
    ("mdns", "no", False),
    ("mdns", "1", True),
    ("mdns", False, False),
    ("listen", "/ip4/127.0.0.1/tcp/0, /ip6/::1/tcp/0", ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0")),
    ("listen", [], ()),
    ("memory_limit", "4GiB", 4 << 30),
    ("memory_limit", "1.5 gb", 3 << 29),
    ("memory_limit", 123, 123),
    ("api_port", "0", 0),
    ("ticket_hours", "0.5", 0.5),
    ("ticket_hours", 2, 2.0),
    ("bootstrap", [f"/dns4/node.example/tcp/4810/p2p/{PEER}"], None),
]


@pytest.mark.parametrize(("key", "raw", "expected"), GOOD)
def test_good_values(empty: Home, key: str, raw: object, expected: object) -> None:
    value = getattr(load_settings(empty, flags={key: raw}, environ={}), key)
    assert value == (tuple(raw) if expected is None else expected)  # type: ignore[arg-type]


BAD = [
    ("mdns", "maybe"),
    ("mdns", 1),
    ("api_port", "70000"),
    ("api_port", -1),
    ("api_port", "x"),
    ("api_port", True),
    ("api_port", 1.5),
    ("n_ctx", 0),
    ("n_ctx", "9" * 30),
    ("log_level", "loud"),
    ("listen", "127.0.0.1:80"),
    ("listen", ["/ip4/127.0.0.1/tcp/1"] * 65),
    ("listen", [1]),
    ("listen", 7),
    ("listen", f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"),
    ("bootstrap", "/ip4/127.0.0.1/tcp/1"),
    ("memory_limit", "lots"),
    ("memory_limit", "-1"),
    ("memory_limit", -5),
    ("ticket_hours", "nan"),
    ("ticket_hours", "inf"),
    ("ticket_hours", []),
    ("name", "two words"),
    ("name", 5),
    ("model_dir", "a\0b"),
    ("api_host", "x" * 5000),
]


@pytest.mark.parametrize(("key", "raw"), BAD)
def test_bad_values_name_the_key_and_what_is_allowed(empty: Home, key: str, raw: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(empty, flags={key: raw}, environ={})
    assert caught.value.code == "bad_setting"
    assert key in caught.value.message
    assert caught.value.message.startswith("flag: ")
    assert caught.value.remedy is not None
    assert key in caught.value.remedy
    assert len(str(caught.value)) < 600


def test_bad_values_name_their_source(empty: Home) -> None:
    with pytest.raises(ConfigError, match="PYAGENT_API_PORT: api_port is 'x'"):
        load_settings(empty, environ={"PYAGENT_API_PORT": "x"})
    write(empty, "api_port = 'x'\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(empty, environ={})
    assert str(empty.config_path) in str(caught.value)
    assert "0 to 65535" in str(caught.value)


def test_unknown_keys_are_errors_with_a_guess(empty: Home) -> None:
    write(empty, "api_prot = 1\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(empty, environ={})
    assert caught.value.code == "unknown_setting"
    assert "'api_port'" in str(caught.value)
    with pytest.raises(ConfigError):
        load_settings(empty, flags={"zzz": 1}, environ={})


@pytest.mark.parametrize(
    "text", ["= 1", "[", "n_ctx = ", "\xff", "n_ctx = 1\nn_ctx = 2", "[n_ctx]"]
)
def test_broken_files(empty: Home, text: str) -> None:
    empty.config_path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_settings(empty, environ={})
    assert str(empty.config_path) in str(caught.value)


def test_names_and_loopback(empty: Home) -> None:
    settings = load_settings(empty, environ={})
    assert settings.node_name == host_name()
    assert settings.api_is_local
    assert not settings.api_needs_token
    for host, local in (("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)):
        settings = load_settings(empty, flags={"api_host": host}, environ={})
        assert settings.api_is_local is local
        assert settings.api_needs_token is not local
    flags = {"api_token_required": True, "model_dir": "/models"}
    settings = load_settings(empty, flags=flags, environ={})
    assert settings.api_needs_token
    assert settings.models_dir(empty) == Path("/models")


def test_host_names_become_node_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for raw, name in (("box.lan", "box"), ("-we ird!", "we-ird-"), ("", "node"), ("...", "node")):
        monkeypatch.setattr("socket.gethostname", lambda raw=raw: raw)
        assert host_name() == name


def test_change_keeps_comments_and_order(empty: Home) -> None:
    write(
        empty, "# mine\nn_ctx = 64 # small\nlisten = [\n  '/ip4/127.0.0.1/tcp/1',\n]\nmdns = true\n"
    )
    change_setting(empty, "listen", "/ip4/127.0.0.1/tcp/2")
    change_setting(empty, "name", "ann")
    change_setting(empty, "mdns", None)
    change_setting(empty, "threads", None)
    assert empty.config_path.read_text() == (
        '# mine\nn_ctx = 64 # small\nlisten = ["/ip4/127.0.0.1/tcp/2"]\nname = "ann"\n'
    )
    assert load_settings(empty, environ={}).name == "ann"


def test_change_creates_the_file_and_refuses_nonsense(empty: Home) -> None:
    with pytest.raises(ConfigError):
        change_setting(empty, "n_ctx", "x")
    with pytest.raises(ConfigError):
        change_setting(empty, "nonsense", "1")
    assert not empty.config_path.exists()
    change_setting(empty, "memory_limit", "2GiB")
    assert tomllib.loads(empty.config_path.read_text()) == {"memory_limit": 2 << 30}


def test_change_gives_up_on_what_it_cannot_edit(empty: Home) -> None:
    text = '"n_ctx" = 64\n'
    write(empty, text)
    with pytest.raises(ConfigError) as caught:
        change_setting(empty, "n_ctx", "128")
    assert "by hand" in str(caught.value)
    assert empty.config_path.read_text() == text


@given(text=st.text(min_size=1, max_size=40))
def test_texts_survive_the_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    home = Home(tmp_path_factory.mktemp("home"))
    try:
        change_setting(home, "model_dir", text)
    except ConfigError:
        assert not text.isprintable()
        return
    assert load_settings(home, environ={}).model_dir == text


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/10.0.0.1/tcp/4810",
        "/ip6/fe80::1/tcp/0",
        "/dns/host/tcp/1",
        "/dns4/a.b-c.example/tcp/65535",
        "/dns6/x/tcp/1",
    ],
)
def test_good_addresses(address: str) -> None:
    assert check_address(address) == address
    assert check_address(address, peer=False) == address
    full = f"{address}/p2p/{PEER}"
    assert check_address(full, peer=True) == full
    assert peer_of(full) == PEER
    assert peer_of(address) is None
    assert without_peer(full) == address
    with pytest.raises(InvalidRequest):
        check_address(address, peer=True)
    with pytest.raises(InvalidRequest):
        check_address(full, peer=False)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/",
        "x" * 600,
        "/ip4/10.0.0.1",
        "/ip4/10.0.0.1/udp/1",
        "/ip4/10.0.0.256/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip6/10.0.0.1/tcp/1",
        "/ip4/10.0.0.1/tcp/65536",
        "/ip4/10.0.0.1/tcp/-1",
        "/ip4/10.0.0.1/tcp/",
        "/ip4/10.0.0.1/tcp/٣",
        "/dns4//tcp/1",
        "/dns4/a b/tcp/1",
        "/unix/x/tcp/1",
        "ip4/10.0.0.1/tcp/1",
        "/ip4/10.0.0.1/tcp/1/",
        "/ip4/10.0.0.1/tcp/1/p2p/QmX",
        f"/ip4/10.0.0.1/tcp/1/ipfs/{PEER}",
        f"/ip4/10.0.0.1/tcp/1/p2p/{PEER}/p2p-circuit",
    ],
)
def test_bad_addresses(address: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_address(address)
    assert caught.value.code == "bad_address"
