"""The verbs that edit the home and need no daemon."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pyagent_node.node.home import DaemonState, Home
from pyagent_node.node.identity import NodeKey

from .conftest import Run


def test_init_creates_and_repeats(run: Run, home: Home) -> None:
    first = run("init", "--name", "one", "--json")
    assert first.status == 0
    assert first.json["created"] is True
    assert first.json["name"] == "one"
    again = run("init", "--json").json
    assert again["created"] is False
    assert again["peer_id"] == first.json["peer_id"]
    assert oct(home.key_path.stat().st_mode & 0o777) == "0o600"
    assert run("id").out.strip() == first.json["peer_id"]
    assert "Found node one" in run("init").out


def test_init_refuses_a_bad_name(run: Run, home: Home) -> None:
    outcome = run("init", "--name", "a b/c", "--json")
    assert outcome.status == 2
    assert outcome.error["code"] == "bad_setting"


def test_home_flag_wins_over_the_environment(run: Run, home: Home, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert run("--home", str(other), "init").status == 0
    assert (other / "node.key").exists()
    assert not home.key_path.exists()


def test_home_must_be_a_directory(run: Run, home: Home, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = run("--home", str(tmp_path / "file"), "id", "--json")
    assert outcome.status == 2
    assert outcome.error["code"] == "bad_home"


def test_damaged_key_is_told_by_name(run: Run, home: Home) -> None:
    home.key_path.parent.mkdir(parents=True)
    home.key_path.write_text("nonsense")
    home.key_path.chmod(0o600)
    outcome = run("id", "--json")
    assert outcome.status == 7
    assert "node.key" in str(outcome.error["message"])


def test_mesh_create_show_list_use(run: Run, home: Home) -> None:
    assert run("mesh", "show", "--json").error["code"] == "no_mesh"
    assert run("mesh", "list").status == 0
    first = run("mesh", "create", "first", "--json").json
    assert (first["visibility"], first["is_authority"]) == ("private", True)
    second = run("mesh", "create", "second", "--public", "--json").json
    assert second["visibility"] == "public"
    meshes = run("mesh", "list", "--json").json["meshes"]
    assert isinstance(meshes, list)
    assert {m["name"]: m["active"] for m in meshes} == {"first": False, "second": True}
    assert run("mesh", "use", "first").status == 0
    assert run("mesh", "show", "--json").json["mesh_id"] == first["mesh_id"]
    assert run("mesh", "show", str(second["mesh_id"])[:8], "--json").json["name"] == "second"
    assert run("mesh", "use", "third", "--json").status == 3
    text = run("mesh", "show").out + run("mesh", "list").out
    assert "first" in text


def test_mesh_shows_no_secret(run: Run, home: Home) -> None:
    outcome = run("mesh", "create", "m", "--json")
    mesh = home.meshes_dir / str(outcome.json["mesh_id"])
    psk = (mesh / "swarm.key").read_text().split()[-1]
    pem = "".join((mesh / "authority.key").read_text().splitlines()[1:-1])
    for output in (
        outcome,
        run("mesh", "show"),
        run("mesh", "show", "--json"),
        run("mesh", "list"),
    ):
        assert psk not in output.out + output.err
        assert pem not in output.out + output.err


@pytest.mark.parametrize("name", ["", "a/b", "x" * 64, "-dash", "tab\t"])
def test_mesh_create_refuses_a_bad_name(name: str, run: Run, home: Home) -> None:
    outcome = run("mesh", "create", "--json", "--", name)
    assert outcome.status == 2
    assert not list(home.meshes_dir.glob("*/mesh.json"))


def test_config_round_trip(run: Run, home: Home) -> None:
    assert run("config", "set", "n_ctx", "4096").status == 0
    assert run("config", "get", "n_ctx").out.strip() == "4096"
    rows = run("config", "show", "--json").json["settings"]
    assert isinstance(rows, list)
    sources = {row["key"]: row["source"] for row in rows}
    assert sources["n_ctx"] == str(home.config_path)
    assert sources["api_port"] == "default"
    assert run("config", "set", "n_ctx", "--unset").status == 0
    assert run("config", "get", "n_ctx", "--json").json["source"] == "default"
    assert run("config", "path").out.strip() == str(home.config_path)
    assert run("config", "set", "listen", "/ip4/127.0.0.1/tcp/1,/ip4/127.0.0.1/tcp/2").status == 0
    assert "tcp/1, /ip4" in run("config", "get", "listen").out


def test_config_says_when_the_environment_wins(
    run: Run, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYAGENT_N_CTX", "512")
    outcome = run("config", "set", "n_ctx", "1024")
    assert "PYAGENT_N_CTX is set and wins" in outcome.err
    assert run("config", "get", "n_ctx").out.strip() == "512"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("set", "n_ctx", "7"), 2),
        (("set", "nonsense", "7"), 2),
        (("set", "n_ctx"), 2),
        (("set", "n_ctx", "64", "--unset"), 2),
        (("get", "nonsense"), 3),
    ],
)
def test_config_refusals(arguments: tuple[str, ...], status: int, run: Run, home: Home) -> None:
    outcome = run("config", *arguments, "--json")
    assert outcome.status == status
    assert outcome.out == ""


def test_down_without_a_daemon(run: Run, home: Home) -> None:
    assert run("down", "--json").json == {"stopped": False}
    assert run("down").out == "No daemon runs.\n"


def test_a_state_file_of_a_dead_daemon_does_not_count(run: Run, home: Home) -> None:
    peer = NodeKey.generate().peer_id
    home.write_state(DaemonState(2**22 + 1, "http://127.0.0.1:1", peer, None, "0", 0.0))
    assert run("down", "--json").json == {"stopped": False}
    assert run("status", "--json").error["code"] == "daemon_not_running"


def test_a_state_file_whose_pid_went_to_another_process_does_not_count(
    run: Run, home: Home
) -> None:
    peer = NodeKey.generate().peer_id
    home.write_state(DaemonState(os.getpid(), "http://127.0.0.1:1", peer, None, "0", 0.0))
    assert run("down", "--json").json == {"stopped": False}


def test_join_refuses_what_is_no_ticket(run: Run, home: Home) -> None:
    for stdin, arguments in (("\n", ()), ("pyagent1nonsense\n", ("-",)), ("", ("\u00e9" * 50,))):
        outcome = run("join", *arguments, "--json", stdin=stdin)
        assert outcome.error["code"] == "ticket_malformed"
        assert outcome.status in (2, 4, 7)
    assert not home.key_path.exists()


def test_up_refuses_a_bad_setting_before_it_creates_anything(run: Run, home: Home) -> None:
    for flags in (("--api", "99999"), ("--listen", "nonsense"), ("--threads", "-1")):
        outcome = run("up", *flags, "--json")
        assert outcome.status == 2, flags
        assert outcome.error["code"] == "bad_setting"
    assert run("up", "--api", ":80", "--json").status == 2
    assert not home.root.exists()


def test_model_store_without_a_daemon(run: Run, home: Home, tmp_path: Path) -> None:
    assert run("model", "list").status == 0
    assert run("model", "rm", "nothing", "--json").status == 3
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(4))
    outcome = run("model", "pull", str(tmp_path / "bad.gguf"), "--json")
    assert (outcome.status, outcome.error["code"]) == (7, "gguf_truncated")
    missing = run("model", "pull", f"file:{tmp_path}/missing.gguf", "--json")
    assert missing.status == 3
    assert run("model", "pull", "nonsense", "--json").status == 2


@pytest.mark.slow
@pytest.mark.model
def test_pull_list_and_remove_a_real_model(run: Run, home: Home, bundled_model: Path) -> None:
    pulled = run("model", "pull", str(bundled_model), "--json").json["model"]
    assert isinstance(pulled, dict)
    assert (pulled["architecture"], pulled["n_layers"]) == ("llama", 30)
    models = run("model", "list", "--json").json["models"]
    assert json.dumps(models).count(pulled["digest"]) == 1
    assert "whole" in run("model", "list").out
    checks = run("doctor", "--json").json["checks"]
    assert isinstance(checks, list)
    model = next(c for c in checks if c["name"].startswith("model "))
    assert model["result"] == "ok"
    file = next(home.models_dir.glob("*/model.gguf"))
    with file.open("r+b") as stream:
        stream.seek(50_000_000)
        stream.write(b"rot")
    damaged = run("doctor", "--json")
    assert damaged.status == 1
    assert "Chunk 47" in damaged.out
    assert run("model", "rm", pulled["digest"][:8]).status == 0
    assert run("model", "list", "--json").json["models"] == []
