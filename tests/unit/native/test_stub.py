"""The typed stub says what the module has."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyagent_node import native
from pyagent_node.native import _native

STUB = Path(native.__file__).with_name("_native.pyi")


def stubtest(stub: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Compare a stub's text with the module, in a tree of its own for mypy to find it in."""
    package = tmp_path / "typing" / "pyagent_node" / "native"
    package.mkdir(parents=True)
    (package / "_native.pyi").write_text(stub)
    (package / "__init__.pyi").touch()
    (package.parent / "__init__.pyi").touch()
    return subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "pyagent_node.native._native"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(package.parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_stubtest_finds_no_difference(tmp_path: Path) -> None:
    done = stubtest(STUB.read_text(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_stubtest_would_find_a_difference(tmp_path: Path) -> None:
    # It passes over a private module without a word when it does not find the stub.
    stub = STUB.read_text()
    assert "position: int, n: int" in stub
    done = stubtest(stub.replace("position: int, n: int", "place: int, n: int"), tmp_path)
    assert done.returncode == 1
    assert 'parameter "position"' in done.stdout


def test_the_package_exports_what_the_module_has() -> None:
    public = {name for name in dir(_native) if not name.startswith("_")}
    assert public == set(native.__all__)
    assert public == set(_native.__all__)
    for name in public:
        assert getattr(native, name) is getattr(_native, name)


def test_everything_public_is_documented_in_the_stub() -> None:
    tree = ast.parse(STUB.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "__new__":
            assert ast.get_docstring(node), node.name


def test_keyword_arguments_have_the_same_names() -> None:
    # stubtest compares names and kinds only where the module gives a text signature.
    for name in ("sample", "hash_file", "hash_chain", "gumbel"):
        assert getattr(_native, name).__text_signature__
