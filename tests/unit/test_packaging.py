"""The lock files pin what the project asks for, for every supported Python, and no place."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(name: str) -> set[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return {line.partition(";")[0].strip() for line in text.splitlines() if line.strip()}


def names(requirements: set[str] | list[str]) -> set[str]:
    found = {re.match(r"[A-Za-z0-9._-]+", text)[0] for text in requirements}  # type: ignore[index]
    return {name.lower().replace("_", "-") for name in found}


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_a_lock_file_holds_exact_versions_and_nothing_else(name: str) -> None:
    bad = [pin for pin in pins(name) if not re.fullmatch(r"[a-z0-9._-]+==[0-9][\w.!+-]*", pin)]
    assert bad == []


def test_every_dependency_is_pinned() -> None:
    runtime, dev = names(pins("requirements.lock")), names(pins("requirements-dev.lock"))
    assert names(PROJECT["project"]["dependencies"]) - runtime == set()
    assert names(PROJECT["build-system"]["requires"]) - runtime == set()
    assert names(PROJECT["project"]["optional-dependencies"]["dev"]) - dev == set()


def test_every_imported_library_is_a_dependency() -> None:
    imported: set[str] = set()
    for path in (ROOT / "kvserve").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    libraries = names(list(imported - sys.stdlib_module_names - {"kvserve"}))
    assert libraries - names(PROJECT["project"]["dependencies"]) == set()


def test_development_uses_the_versions_that_run() -> None:
    assert pins("requirements.lock") <= pins("requirements-dev.lock")


def test_the_build_group_is_what_the_build_requires() -> None:
    assert PROJECT["dependency-groups"]["build"] == PROJECT["build-system"]["requires"]
