"""The structure of the repository: packaging, locks, declared dependencies, forbidden text."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCE_FOLDERS = (
    "base",
    "native",
    "consensus",
    "sharding",
    "inference",
    "node",
    "cli",
    "benchmarks",
    "simulations",
)


def tracked() -> list[Path]:
    """Return the files under version control; skip in a source tree without it."""
    found = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]


def sources() -> list[Path]:
    return [path for folder in SOURCE_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_package_is_listed_typed_and_documented() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    listed = set(setuptools["packages"])
    assert set(setuptools["package-dir"]) == listed
    found = {
        ".".join(["pyagent_node", *path.parent.relative_to(ROOT).parts])
        for path in sources()
        if path.name == "__init__.py"
    }
    assert found == listed
    for name, folder in setuptools["package-dir"].items():
        assert name == "pyagent_node." + folder.replace("/", ".")
        assert (ROOT / folder / "py.typed").exists(), f"{folder} has no py.typed"
        assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())), folder


def test_every_imported_distribution_is_declared() -> None:
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *itertools.chain(*optional.values())]
    declared = {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in wanted}
    owners = metadata.packages_distributions()
    missing: dict[str, str] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top == "pyagent_node":
                    continue
                distributions = {d.lower().replace("_", "-") for d in owners.get(top, [top])}
                if not distributions & declared:
                    missing[top] = str(path.relative_to(ROOT))
    assert not missing, f"imported but not in [project] dependencies: {missing}"


def test_locks_hold_every_dependency_with_hashes() -> None:
    def locked(name: str) -> dict[str, str]:
        text = (ROOT / "requirements" / name).read_text()
        assert "://" not in text, f"{name} names a host"
        blocks = re.findall(r"^([a-z0-9._-]+)==(\S+).*\\\n(?:\s+--hash=sha256:.*\n)+", text, re.M)
        pinned = re.findall(r"^[a-z0-9._-]+==", text, re.M)
        assert len(blocks) == len(pinned), f"an entry of {name} has no hash"
        return dict(blocks)

    runtime, dev = locked("lock.txt"), locked("lock-dev.txt")
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    for requirement in wanted:
        name = re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")
        assert name in dev, f"{name} is not locked: run `make lock`"
    for requirement in PROJECT["project"]["dependencies"]:
        name = re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")
        assert name in runtime, f"{name} is not locked: run `make lock`"
    assert {k: dev.get(k) for k in runtime} == runtime, "the two locks disagree"
    assert "torch" not in runtime


FORBIDDEN = {
    "an unfinished piece": re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b"),
    "a path of one machine": re.compile(r"(?<![\w.])/(work|root|home/[a-z]+)/[a-z.]"),
}


def test_no_file_holds_text_that_must_not_be_there() -> None:
    hits = []
    for path in tracked():
        if path.suffix in (".gguf", ".png", ".so") or path == Path(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for what, pattern in FORBIDDEN.items():
            for match in pattern.finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                hits.append(f"{path.relative_to(ROOT)}:{line}: {what}: {match[0]!r}")
    assert not hits, "\n".join(hits)


def test_no_secret_and_no_large_file_is_tracked() -> None:
    for path in tracked():
        assert path.stat().st_size < 1_000_000, f"{path} is large"
        assert path.suffix not in (".key", ".pem", ".gguf", ".so", ".pyd"), path


def test_tests_do_not_sleep_and_use_no_network_beyond_loopback() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep":
                raise AssertionError(f"{path}:{node.lineno} sleeps")


def test_tests_with_daemons_run_among_themselves() -> None:
    """Daemons notice each other's death by time: no other tests may keep the machine busy.

    Two modules of them at once do not: they wait half of the time.
    """
    starts = re.compile(r"\b(local_swarm|Daemon|two_hosts|two_halves|open_mesh)\(")
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if path != Path(__file__) and starts.search(text):
            assert re.search(r"pytest\.mark\.(alone|daemons)\b", text), f"{path} starts daemons"


def test_the_changelog_and_licence_are_there() -> None:
    assert "Keep a Changelog" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_ci_runs_make_test() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "exec make test" in script
