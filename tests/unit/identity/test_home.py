"""Homes and the meshes in them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from pyagent_node.base.errors import ConfigError, CorruptData, InvalidRequest, NotFound, Refused
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.node.certificates import verify_certificate
from pyagent_node.node.home import DaemonState, Home
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.profiles import (
    MeshProfile,
    active_profile,
    create_mesh,
    load_profile,
    mesh_ids,
    save_profile,
    set_active,
)
from pyagent_node.node.swarm_key import parse_swarm_key

NOW = 1_800_000_000
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")


def made(home: Home, name: str = "meadow", visibility: str = "private") -> MeshProfile:
    return create_mesh(home, name, visibility, node_name="ann", clock=lambda: NOW)  # type: ignore[arg-type]


def test_pyagent_home_overrides_all(tmp_path: Path) -> None:
    home = Home.default({"PYAGENT_HOME": str(tmp_path)})
    paths = [home.key_path, home.token_path, home.config_path, home.state_path, home.models_dir]
    assert all(p.is_relative_to(tmp_path) for p in [*paths, home.log_path, home.meshes_dir])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="XDG")
def test_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DATA", "CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    home = Home.default({})
    assert home.key_path == tmp_path / "DATA/pyagent-node/node.key"
    assert home.config_path == tmp_path / "CONFIG/pyagent-node/config.toml"
    assert home.state_path == tmp_path / "STATE/pyagent-node/daemon.json"


def test_relative_home_and_file_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Home.default({"PYAGENT_HOME": "here"}).root == tmp_path / "here"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        Home.default({"PYAGENT_HOME": str(tmp_path / "file")})
    assert caught.value.code == "bad_home"


def test_token(tmp_path: Path) -> None:
    home = Home(tmp_path)
    token = home.api_token()
    assert len(token) >= 43
    assert home.api_token() == token
    home.token_path.write_text("short\n")
    with pytest.raises(CorruptData) as caught:
        home.api_token()
    assert caught.value.code == "bad_token_file"
    assert "short" not in str(caught.value)


def test_state_file(tmp_path: Path) -> None:
    home = Home(tmp_path / "new")
    assert home.read_state() is None
    state = DaemonState(
        os.getpid(), "http://127.0.0.1:1", PeerId("p"), Digest("0" * 64), "0.1", 1.5
    )
    home.write_state(state)
    assert home.read_state() == state
    home.state_path.write_text("{")
    assert home.read_state() is None
    home.clear_state()
    home.clear_state()
    assert home.read_state() is None


@posix
def test_created_mesh_loads_again(tmp_path: Path) -> None:
    home = Home(tmp_path)
    profile = made(home)
    again = load_profile(home, profile.mesh_id)
    for field in ("genesis", "name", "role", "psk", "certificate", "bootstrap"):
        assert getattr(again, field) == getattr(profile, field)
    assert again.authority().peer_id == profile.genesis.authority
    key = home.node_key()
    assert profile.genesis.writer == key.peer_id
    assert profile.genesis.authority != key.peer_id
    certificate = verify_certificate(profile.certificate, profile.genesis, key.peer_id, NOW)
    assert certificate.role == "voter"
    directory = home.mesh_dir(profile.mesh_id)
    for name in ("mesh.json", "swarm.key", "authority.key"):
        assert (directory / name).stat().st_mode & 0o777 == 0o600
    assert parse_swarm_key((directory / "swarm.key").read_bytes()) == profile.psk


def test_public_mesh_has_no_psk(tmp_path: Path) -> None:
    home = Home(tmp_path)
    profile = made(home, visibility="public")
    assert profile.psk is None
    assert not (home.mesh_dir(profile.mesh_id) / "swarm.key").exists()
    assert load_profile(home, profile.mesh_id).psk is None


def test_repr_shows_no_secret(tmp_path: Path) -> None:
    profile = made(Home(tmp_path))
    assert profile.psk is not None
    for shown in (repr(profile), str(profile)):
        assert profile.psk.hex() not in shown
        assert repr(profile.psk) not in shown


@pytest.mark.parametrize("name", ["", "-x", "a b", "x" * 64])
def test_bad_names_write_nothing(tmp_path: Path, name: str) -> None:
    home = Home(tmp_path)
    with pytest.raises(InvalidRequest):
        made(home, name)
    with pytest.raises(InvalidRequest):
        create_mesh(home, "ok", "private", node_name=name, clock=lambda: NOW)
    assert mesh_ids(home) == []


def test_choosing_among_meshes(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(NotFound) as none_yet:
        active_profile(home)
    assert none_yet.value.code == "no_mesh"
    assert "mesh create" in str(none_yet.value)
    a, b, c = made(home, "a"), made(home, "b"), made(home, "same")
    d = made(home, "same")
    assert len(mesh_ids(home)) == 4
    assert active_profile(home).mesh_id == d.mesh_id
    assert active_profile(home, "a").mesh_id == a.mesh_id
    assert active_profile(home, b.mesh_id).mesh_id == b.mesh_id
    assert active_profile(home, c.mesh_id[:12]).mesh_id == c.mesh_id
    with pytest.raises(ConfigError) as unclear:
        active_profile(home, "same")
    assert unclear.value.code == "ambiguous_mesh"
    with pytest.raises(NotFound) as missing:
        active_profile(home, "nowhere")
    assert missing.value.code == "mesh_not_found"
    set_active(home, a.mesh_id)
    assert active_profile(home).mesh_id == a.mesh_id
    home.active_path.unlink()
    with pytest.raises(ConfigError):
        active_profile(home)


def test_damaged_profiles_are_named(tmp_path: Path) -> None:
    home = Home(tmp_path)
    profile = made(home)
    path = home.mesh_dir(profile.mesh_id) / "mesh.json"
    good = json.loads(path.read_text())
    other = made(Home(tmp_path / "other"))
    other_file = json.loads(
        (Home(tmp_path / "other").mesh_dir(other.mesh_id) / "mesh.json").read_text()
    )
    for bad in (
        "",
        "{",
        json.dumps({**good, "version": 2}),
        json.dumps({**good, "genesis": "!!"}),
        json.dumps({**good, "genesis": other_file["genesis"]}),
        json.dumps({**good, "role": "king"}),
        json.dumps({**good, "bootstrap": ["x"] * 100}),
        json.dumps({**good, "surprise": 1}),
    ):
        path.write_text(bad)
        with pytest.raises(CorruptData) as caught:
            load_profile(home, profile.mesh_id)
        assert caught.value.code == "bad_profile"
        assert str(path) in str(caught.value)
        assert caught.value.remedy


@posix
def test_keys_beside_the_profile_are_checked(tmp_path: Path) -> None:
    home = Home(tmp_path)
    profile = made(home)
    directory = home.mesh_dir(profile.mesh_id)
    (directory / "swarm.key").chmod(0o644)
    with pytest.raises(Refused):
        load_profile(home, profile.mesh_id)
    (directory / "swarm.key").chmod(0o600)
    (directory / "authority.key").unlink()
    assert load_profile(home, profile.mesh_id).authority_key is None
    with pytest.raises(Refused) as caught:
        load_profile(home, profile.mesh_id).authority()
    assert caught.value.code == "not_authority"
    NodeKey.generate().save(directory / "authority.key")
    with pytest.raises(CorruptData):
        load_profile(home, profile.mesh_id)


def test_a_directory_without_a_profile_does_not_count(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (home.meshes_dir / ("0" * 64)).mkdir(parents=True)
    (home.meshes_dir / "junk").mkdir()
    (home.meshes_dir / "junk" / "mesh.json").touch()
    assert mesh_ids(home) == []
    profile = made(home)
    save_profile(home, profile)
    assert mesh_ids(home) == [profile.mesh_id]


def test_lock(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with home.lock(), pytest.raises(Exception, match=f"in use by process {os.getpid()}"):
        home.lock().acquire()
