"""The schema: what the steps lead to, what happens to an older, a newer and a damaged index."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import NullPool, create_engine

from kvserve.store.errors import IndexDamaged, IndexFailed, SchemaTooNew
from kvserve.store.migrate import migrations, revisions, upgrade
from kvserve.store.tables import metadata
from tests.catalog_fixtures import conversation, opened, run, turn

ROOT = Path(__file__).resolve().parents[2]
SECOND_STEP = """
import sqlalchemy as sa
from alembic import op

revision = "{number}"
down_revision = "{before}"


def upgrade() -> None:
    with op.batch_alter_table("conversations") as table:
        table.add_column(sa.Column("colour", sa.Text, server_default="blue"))
        table.alter_column("title", new_column_name="name_shown")
    {more}
"""


def schema(path: Path) -> dict[str, list[str]]:
    """Return what the index consists of: the parts of each definition, in no order."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"
            " AND name <> 'alembic_version' AND name NOT LIKE 'sqlite_%'"
        ).fetchall()
    return {name: sorted(re.split(r",\s*\n|\(\n|\n\)", " ".join([sql]))) for name, sql in rows}


def trimmed(parts: dict[str, list[str]]) -> dict[str, list[str]]:
    return {
        name: sorted(filter(None, (" ".join(part.split()) for part in defined)))
        for name, defined in parts.items()
    }


def steps_with(folder: Path, more: str = "pass") -> Path:
    """Return the project's steps and one more."""
    last = revisions(migrations())[-1]
    number = f"{int(last) + 1:04d}"
    shutil.copytree(migrations(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    step = SECOND_STEP.format(number=number, before=last, more=more)
    (folder / "versions" / f"{number}_colour.py").write_text(step, encoding="utf-8")
    return folder


def test_the_steps_lead_to_the_tables_of_the_code(tmp_path: Path) -> None:
    stepped, made = tmp_path / "stepped.sqlite3", tmp_path / "made.sqlite3"
    assert upgrade(stepped)
    for path in (stepped, made):
        engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
        with engine.begin() as connection:
            metadata.create_all(connection)
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            found = compare_metadata(context, metadata)
            assert [change for change in found if "alembic_version" not in str(change)] == []
    # Alembic compares neither checks nor the conditions of indexes.
    assert trimmed(schema(stepped)) == trimmed(schema(made))


def test_a_step_is_named_by_its_number_and_rests_on_the_one_before() -> None:
    before = None
    for file in sorted((migrations() / "versions").glob("*.py")):
        values = {
            ast.unparse(node.targets[0]): ast.literal_eval(node.value)
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign)
        }
        assert values == {"revision": file.name.partition("_")[0], "down_revision": before}
        before = values["revision"]


def test_a_current_index_is_opened_without_alembic(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    assert upgrade(path)
    code = (
        "import sys; from pathlib import Path; from kvserve.store.migrate import upgrade\n"
        f"assert not upgrade(Path({str(path)!r}))\n"
        "assert not {'alembic', 'sqlalchemy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_index_is_for_its_owner_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as catalog:
            await catalog.put(conversation("c", []))
            modes = [stat.S_IMODE(os.stat(file).st_mode) for file in os.scandir(tmp_path)]
            assert modes == [0o600] * 3

    upgrade(tmp_path / "index.sqlite3")
    run(scenario())


def test_an_older_index_is_carried_over_with_its_data(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"

    async def fill() -> None:
        async with opened(tmp_path) as catalog:
            await turn(catalog, "c", range(9), num_messages=3, title="Titel")

    run(fill())
    steps = steps_with(tmp_path / "steps")
    assert upgrade(path, steps=steps) and not upgrade(path, steps=steps)
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name, name_shown, colour, tip_id FROM conversations")
        assert rows.fetchall() == [("c", "Titel", "blue", 1)]
        assert connection.execute("SELECT count(*) FROM messages").fetchone() == (3,)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ("op.execute('INSERT INTO nowhere VALUES (1)')", Exception),
        ("op.execute('DELETE FROM roots')", IndexDamaged),
    ],
)
def test_a_step_that_fails_leaves_the_older_index(
    tmp_path: Path, more: str, error: type[Exception]
) -> None:
    path = tmp_path / "index.sqlite3"

    async def look() -> None:
        async with opened(tmp_path) as catalog:
            await turn(catalog, "c", range(9), title="Titel")
            (head,) = await catalog.heads()
            assert head.title == "Titel"

    run(look())
    before = schema(path)
    with pytest.raises(error):
        upgrade(path, steps=steps_with(tmp_path / "steps", more))
    assert schema(path) == before and not upgrade(path)
    run(look())


def test_a_newer_index_is_refused_in_words_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    upgrade(path, steps=steps_with(tmp_path / "steps"))
    before = path.read_bytes()
    with pytest.raises(SchemaTooNew, match=r"has schema 0002.*knows up to 0001.*later version"):
        upgrade(path)
    assert path.read_bytes() == before


def test_what_is_not_an_index_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    for data in (b"no database at all" * 400, b"SQLite format 3\0" + b"\xff" * 5000):
        path.write_bytes(data)
        with pytest.raises(IndexDamaged):
            upgrade(path)
        assert path.read_bytes() == data
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE others (id)")
    with pytest.raises(IndexDamaged, match="not an index of kvserve"):
        upgrade(path)


def test_a_damaged_index_is_found_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"

    async def fill() -> None:
        async with opened(tmp_path) as catalog:
            await turn(catalog, "c", range(9000))

    run(fill())
    whole = path.read_bytes()
    found = 0
    for page in range(1, len(whole) // 4096):
        data = bytearray(whole)
        data[page * 4096 : page * 4096 + 64] = os.urandom(64)
        path.write_bytes(data)
        try:
            upgrade(path)
        except IndexDamaged:
            found += 1
    # The rest are pages of one row's tokens, whose bytes SQLite cannot judge but for their links.
    assert found >= len(whole) // 4096 - 2
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IndexDamaged):
        upgrade(path)


def test_an_interrupted_creation_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    path.touch()
    assert upgrade(path)
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    assert upgrade(path) and not upgrade(path)


def test_an_index_that_cannot_be_opened_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(IndexFailed, match="cannot be opened"):
        upgrade(tmp_path / "missing" / "index.sqlite3")


def test_odd_names_of_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "50% of?x=1&#[ä] :"
    folder.mkdir()
    assert upgrade(folder / "index.sqlite3", steps=steps_with(tmp_path / "100%s"))
    shutil.rmtree(folder)
    folder.mkdir()

    async def scenario() -> None:
        async with opened(folder) as catalog:
            await turn(catalog, "c", range(3))

    run(scenario())
    assert [file.name for file in folder.iterdir()] == ["index.sqlite3"]


def test_the_wheel_holds_the_steps(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel")
    (wheel,) = builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "from pathlib import Path; from kvserve.store.migrate import migrations, upgrade\n"
        f"assert migrations() == Path({str(tmp_path / 'site' / 'kvserve' / 'migrations')!r})\n"
        f"assert upgrade(Path({str(tmp_path / 'index.sqlite3')!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
