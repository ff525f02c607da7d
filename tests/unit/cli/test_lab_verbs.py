"""``lab`` as a user types it, where the lab itself cannot or need not run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pyagent_node.simulations.lab import namespaces, tun
from tests.unit.cli.conftest import Run


def test_list_names_every_scenario(run: Run) -> None:
    outcome = run("lab", "list")
    assert outcome.status == 0
    assert "four-continents" in outcome.out
    lines = run("lab", "list", "--json")
    assert len(lines.out.splitlines()) == len(outcome.out.splitlines()) - 1
    assert {"name", "about", "hosts", "ranks", "links", "events"} <= lines.json.keys()


def test_check_says_what_a_scenario_means(run: Run) -> None:
    outcome = run("lab", "check", "four-continents")
    assert outcome.status == 0
    assert "asia - europe: 60 ms (+-3 ms), loss 1%, 50 Mbit/s" in outcome.out
    assert "3 s: australia -x- america, asia, europe" in outcome.out
    assert run("lab", "check", "home-lan", "--json").json["events"] == []


def test_a_wrong_file_is_refused_with_its_place(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('name = "x"\n[[site]]\nname = "a"\nhosts = "many"\n')
    for verb in ("check", "run"):
        outcome = run("lab", verb, str(path), "--json")
        assert outcome.status == 2
        assert outcome.error["code"] == "bad_scenario"
        assert "site[0].hosts" in str(outcome.error["message"])
    missing = run("lab", "run", "nowhere", "--json")
    assert (missing.status, missing.error["code"]) == (3, "no_scenario")


@pytest.mark.parametrize("lack", ["system", "root", "ip", "tun"])
def test_where_the_lab_cannot_run_it_says_why(
    run: Run, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin" if lack == "system" else "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000 if lack == "root" else 0, raising=False)
    monkeypatch.setattr(
        namespaces.shutil, "which", lambda name: None if lack == "ip" else f"/sbin/{name}"
    )
    monkeypatch.setattr(tun, "DEVICE", "/nowhere/tun" if lack == "tun" else os.devnull)
    outcome = run("lab", "run", "home-lan", "--json")
    assert outcome.status == 8
    assert outcome.error["code"] == "no_lab"
    words = {"system": "Linux", "root": "root", "ip": "iproute2", "tun": "/nowhere/tun"}
    assert words[lack] in str(outcome.error["message"])
    assert "--shape" in str(outcome.error["remedy"])


def test_what_cannot_be_shaped_is_said_before_anything_starts(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"")
    path = tmp_path / "x.toml"
    path.write_text(
        'name = "x"\n[[site]]\nname = "a"\n[[site]]\nname = "b"\n'
        '[[event]]\ndo = "partition"\nat = "1s"\nsides = [["a"], ["b"]]\n'
        f'[model]\nsource = "{model}"\n'
    )
    outcome = run("lab", "run", str(path), "--shape", "--json")
    assert outcome.status == 8
    assert outcome.error["code"] == "not_shapeable"
