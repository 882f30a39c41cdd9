"""The guide's words are explained, and its names and figures are those of the code.

Each test reads one table or way of writing; where there is a whole to be named, it asks for it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer

from kvserve.cli.cache.commands import app as cache_commands
from kvserve.config import Settings, flag_of
from tests.docs.pages import DECISIONS, GUIDE, GUIDE_PAGE, README, ROOT, Page, code_in

PACKAGES = ("core", "store", "cache", "engine", "chat", "api")


def modules() -> Iterator[Any]:
    for package in PACKAGES:
        for path in sorted((ROOT / "kvserve" / package).glob("*.py")):
            if path.stem != "__init__":
                yield importlib.import_module(f"kvserve.{package}.{path.stem}")
    yield importlib.import_module("kvserve.app")


def test_every_term_is_explained_once_and_used() -> None:
    terms = [
        word.strip()
        for row in GUIDE_PAGE.table("word", "meaning")
        for word in re.split(r"[/,]", row[0])
    ]
    assert len(terms) == len(set(terms))
    table = GUIDE_PAGE.table("word", "meaning")
    explained = {f"| {row[0]} | {row[1]} |" for row in table}
    rest = [line for line in GUIDE_PAGE.text.splitlines() if line not in explained]
    text = "\n".join([*rest, *(row[1] for row in table)]).replace("-", " ")
    unused = {t for t in terms if not re.search(rf"\b{t.replace('-', ' ')}", text, re.IGNORECASE)}
    assert unused <= {"TTFT", "TPOT"}  # of requests in general


def test_the_words_of_the_trade_are_explained() -> None:
    terms = {
        word.strip()
        for row in GUIDE_PAGE.table("word", "meaning")
        for word in re.split(r"[/,]", row[0])
    }
    needed = "prefill decode prefix cut segment key root tip conversation turn snapshot tier lease"
    needed += (
        " pin evict drop quarantine hit miss TTL TTFT TPOT run index heal gap guard sweep save"
    )
    needed += " identity namespace tenant window span write-behind"
    assert set(needed.split()) <= terms


def test_every_figure_with_a_name_is_the_codes() -> None:
    """`NAME` (value): the constant of that name, in the one module that has it."""
    named = re.findall(r"`(?:kvserve\.([\w.]+)\.)?([A-Z_]{4,})`\s\(([^()]+)\)", GUIDE_PAGE.text)
    assert len(named) > 12
    places = list(modules())
    for module, name, text in named:
        found = {
            getattr(place, name)
            for place in places
            if hasattr(place, name) and (not module or place.__name__ == f"kvserve.{module}")
        }
        assert found == {_value(text)}, name


def _value(text: str) -> object:
    """Return the value that is meant by 4,096 or 64 MiB or 7 days."""
    number, _, unit = text.partition(" ")
    count = int(number.replace(",", ""))
    if unit in ("day", "days"):
        return timedelta(days=count)
    return count * {"": 1, "MiB": 2**20, "GiB": 2**30}[unit]


@pytest.mark.parametrize("page", [GUIDE, DECISIONS], ids=lambda path: path.name)
def test_every_name_of_the_code_exists(page: Path) -> None:
    for name in code_in(Page.read(page).prose):
        if re.fullmatch(r"kvserve(\.\w+)+", name):
            resolve(name)


def resolve(name: str) -> Any:
    """Return what a dotted name stands for: a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("page", [GUIDE, DECISIONS, README], ids=lambda path: path.name)
def test_every_path_and_link_leads_somewhere(page: Path) -> None:
    text = Page.read(page).prose
    paths = {
        name
        for name in code_in(text)
        if re.match(r"(kvserve|tests|docs|scripts|migrations)/", name)
    }
    assert len(paths) > (0 if page == DECISIONS else 5)
    missing = [name for name in paths if not (ROOT / name.split(" ")[0]).exists()]
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing += [link for link in links if not (page.parent / link).exists()]
    scripts = re.findall(r"python -m (scripts\.\w+|tests\.[\w.]+)", text)
    missing += [name for name in scripts if not (ROOT / f"{name.replace('.', '/')}.py").is_file()]
    assert missing == []


def test_every_flag_is_one_and_those_of_the_disk_are_all_there() -> None:
    known = {flag_of(name) for name in Settings.model_fields} | {"--no-caching"}
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE_PAGE.text))
    assert said <= known
    disk = [
        name for name in Settings.model_fields if "disk" in name or name in ("persist", "data_dir")
    ]
    assert {flag_of(name) for name in (*disk, "verify_cache", "ram_budget")} <= said


def test_every_command_of_the_store_is_named() -> None:
    command = typer.main.get_command(cache_commands)
    assert isinstance(command, typer.core.TyperGroup)
    recovery = GUIDE_PAGE.section("## Recovery").text
    for name in ("verify", "repair", "gc"):
        assert name in command.commands and f"**{name}**" in recovery


def test_the_guards_and_their_defaults_are_the_settings() -> None:
    rows = GUIDE_PAGE.table("guard", "setting", "default", "refused with", "counts")
    defaults = {code_in(setting)[0]: default for _, setting, default, _, _ in rows}
    assert set(defaults) == {flag_of(name) for name in Settings.model_fields if "disk" in name}
    for flag, shown in defaults.items():
        value = Settings.model_fields[flag.removeprefix("--").replace("-", "_")].default
        assert shown.split(" ")[0] == ("unlimited" if value is None else f"{value:g}"), flag
    shown_errors = {tuple(row[:2]) for row in GUIDE_PAGE.table("status", "code", "when")}
    assert {tuple(row[3].split(" ")) for row in rows} <= shown_errors
