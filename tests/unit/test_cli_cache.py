"""`kvserve cache` on a stopped store: real commands on real files."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kvserve.cli.cache.file import write_whole
from kvserve.cli.main import app
from kvserve.store.catalog import Catalog
from kvserve.store.lock import StoreLock
from kvserve.store.store import Store
from tests.store_fakes import IDENTITY, write
from tests.unit.cache_stores import ALICE, ROOMY, build, talks

ROOT = Path(__file__).resolve().parents[2]
ON_ONE = ("show", "pin", "unpin", "rm")
"""Commands for one conversation."""

ALL = [["ls"], *([command, "main"] for command in ON_ONE)]


@dataclass(frozen=True)
class Command:
    """`kvserve cache` on one folder."""

    folder: Path

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["cache", *arguments, "--data-dir", str(self.folder)])

    def text(self, *arguments: str) -> str:
        result = self(*arguments)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.text(*arguments, "--json"))

    def refusal(self, code: int, *arguments: str) -> str:
        """Return the one line that is all that such a command prints."""
        result = self(*arguments)
        assert (result.exit_code, result.stdout) == (code, ""), result.output
        assert isinstance(result.exception, SystemExit)
        [line] = result.stderr.splitlines()
        assert line.startswith("kvserve: ")
        return line

    def ids(self, *arguments: str) -> list[str]:
        return sorted(item["id"] for item in self.json("ls", *arguments)["items"])

    def snapshots(self) -> list[Path]:
        return sorted((self.folder / "snapshots").glob("??/*.safetensors"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "data"
    build(folder)
    return folder


@pytest.fixture
def cache(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """A store of its own for each test, and nothing of this machine's settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KVSERVE_API_KEY", raising=False)
    shutil.copytree(built, tmp_path / "data")
    return Command(tmp_path / "data")


# -- looking -----------------------------------------------------------------------------------


def test_ls_shows_all_tenants_conversations(cache: Command) -> None:
    items = cache.json("ls")["items"]
    assert {(item["tenant"], item["id"]) for item in items} == {
        (ALICE, "main"),
        (ALICE, "fork"),
        (ALICE, "other"),
        ("", "other"),
    }
    found = {item["id"]: item for item in items if item["tenant"] == ALICE}
    assert (found["main"]["tokens"], found["main"]["messages"]) == (230, 5)
    assert found["main"]["branches"] == found["fork"]["branches"] == 2
    assert all(item["tier"] == "disk" for item in items)
    size = sum(file.stat().st_size for file in cache.snapshots())
    assert cache.json("ls")["bytes"] == size
    header, *rows, totals = cache.text("ls").splitlines()
    assert header.split()[:2] == ["ID", "TENANT"] and len(rows) == 4
    assert totals.startswith("4 conversations, 650 tokens, ")


def test_a_list_may_be_of_any_length(cache: Command) -> None:
    async def scenario() -> None:
        catalog = Catalog(cache.folder / "index.sqlite3")
        try:
            keys = [(ALICE, name) for name in ("main", *map(str, range(2500)), "fork")]
            assert set(await catalog.usage(keys)) == {(ALICE, "main"), (ALICE, "fork")}
        finally:
            await catalog.aclose()

    asyncio.run(scenario())


def test_a_tenant_is_named_by_its_key_or_by_how_ls_shows_it(
    cache: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["fork", "main", "other"]
    assert cache.ids("--api-key", "alice") == cache.ids("--tenant", ALICE[:6]) == own
    assert cache.ids("--tenant", "-") == ["other"]
    assert cache.ids("--api-key", "bob") == []
    monkeypatch.setenv("KVSERVE_API_KEY", "alice")
    assert cache.ids() == own
    assert "give one" in cache.refusal(2, "ls", "--tenant", "-")
    monkeypatch.delenv("KVSERVE_API_KEY")
    assert "no tenant begins with zz" in cache.refusal(1, "ls", "--tenant", "zz")


@pytest.mark.parametrize("command", ON_ONE)
def test_an_id_that_two_tenants_have_is_asked_about(cache: Command, command: str) -> None:
    line = cache.refusal(2, command, "other")
    assert f"2 tenants have a conversation other: -, {ALICE[:12]}" in line
    assert "--tenant" in line
    assert cache(command, "other", "--tenant", "-").exit_code == 0


def test_show_draws_the_tree_and_the_messages(cache: Command) -> None:
    tree, messages = cache.text("show", "main").split("\n\n")[1:]
    assert [line.split()[:2] for line in tree.splitlines()[1:]] == [
        ["●", "0-120"],
        ["├─●", "120-160"],
        ["●", "120-170"],
        ["├─●", "170-210"],
        ["●", "170-230"],
    ]
    assert tree.splitlines()[-1].endswith("main <")
    roles = [line.split()[1:3] for line in messages.splitlines()[1:]]
    assert roles[0] == ["system", "0-120"] and roles[-1] == ["assistant", "200-230"]


def test_show_as_json_has_the_same_tree(cache: Command) -> None:
    shown = cache.json("show", "main")
    assert shown["id"] == "main" and len(shown["cuts"]) == 5
    assert set(shown["cuts"][0]) == {"message", "role", "start", "end", "tier", "bytes"}
    tree = shown["tree"]
    assert [(node["parent"], node["start"], node["end"], node["tips"]) for node in tree] == [
        (None, 0, 120, []),
        (0, 120, 170, []),
        (0, 120, 160, ["other"]),
        (1, 170, 230, ["main"]),
        (1, 170, 210, ["fork"]),
    ]
    held = sum(file.stat().st_size for file in cache.snapshots())
    alone = cache.json("show", "other", "--tenant", "-")
    assert sum(node["bytes"] for node in tree + alone["tree"]) == pytest.approx(held, abs=9)


def test_a_conversation_that_shares_no_message_is_not_in_the_tree(cache: Command) -> None:
    assert [node["tips"] for node in cache.json("show", "other", "--tenant", "-")["tree"]] == [
        ["other"]
    ]


def test_what_is_not_there_is_said_with_status_1(cache: Command, tmp_path: Path) -> None:
    for command in ON_ONE:
        assert "no conversation nobody" in cache.refusal(1, command, "nobody")
    assert "no conversation nobody" in cache.refusal(1, "export", "nobody", str(tmp_path / "f"))
    nowhere = Command(tmp_path / "nowhere")
    for arguments in (*ALL, ["verify"], ["repair"], ["gc"]):
        assert "there is no store in" in nowhere.refusal(1, *arguments)
    assert not nowhere.folder.exists(), "looking makes nothing"


# -- changing ----------------------------------------------------------------------------------


def test_a_pin_lasts_or_ends(cache: Command) -> None:
    assert cache.text("pin", "main") == "pinned main\n"
    assert cache.text("pin", "fork", "--ttl", "2h").startswith("pinned fork until 20")
    items = {item["id"]: item for item in cache.json("ls", "--api-key", "alice")["items"]}
    assert items["main"]["pinned"] and items["main"]["pinned_until"] is None
    assert items["fork"]["pinned"] and items["fork"]["pinned_until"] is not None
    assert "pinned for 2 h" in cache.text("ls")
    cache.text("unpin", "main")
    assert not cache.json("show", "main")["pinned"]


@pytest.mark.parametrize("ttl", ["", "0", "-1", "1.5h", "2 weeks", "9999999d", "nan"])
def test_a_time_that_is_none_is_refused(cache: Command, ttl: str) -> None:
    assert "--ttl: should be a time such as" in cache.refusal(2, "pin", "main", "--ttl", ttl)


def test_rm_deletes_what_nobody_else_uses(cache: Command) -> None:
    before = len(cache.snapshots())
    assert cache.text("rm", "fork") == "deleted fork\n"
    assert len(cache.snapshots()) == before - 1
    assert cache.ids("--api-key", "alice") == ["main", "other"]
    assert "all well" in cache.text("verify")
    for conversation in ("main", "other"):
        cache.text("rm", conversation, "--api-key", "alice")
    cache.text("rm", "other")
    assert cache.snapshots() == []


# -- export and import -------------------------------------------------------------------------


def test_an_export_comes_back_as_another_tenants_conversation(
    cache: Command, tmp_path: Path
) -> None:
    file = tmp_path / "main.safetensors"
    assert cache.text("export", "main", str(file)).startswith(f"exported main to {file}, ")
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.glob("*.part")) == []
    assert cache.text("import", str(file)).startswith("imported main: 230 tokens in 5 messages, ")
    taken = cache.json("show", "main", "--tenant", "-")
    assert taken["saved"] and taken["tokens"] == 230
    assert [node["tips"] for node in taken["tree"]] == [["main"]], "tenants share nothing"
    again = cache.json("import", str(file), "--id", "again", "--api-key", "alice")
    assert (again["id"], again["tenant"], again["branches"]) == ("again", ALICE, 3)
    assert "all well" in cache.text("verify")


def test_an_import_makes_a_store_where_there_is_none(cache: Command, tmp_path: Path) -> None:
    file = tmp_path / "main.safetensors"
    cache.text("export", "main", str(file))
    elsewhere = Command(tmp_path / "new" / "data")
    elsewhere.text("import", str(file), "--id", "here")
    assert elsewhere.ids() == ["here"]


def test_an_import_never_takes_an_id_in_use_or_an_id_that_is_none(
    cache: Command, tmp_path: Path
) -> None:
    file = str(tmp_path / "main.safetensors")
    cache.text("export", "main", file)
    before = cache.json("ls")
    assert "main already" in cache.refusal(2, "import", file, "--api-key", "alice")
    assert "other already" in cache.refusal(2, "import", file, "--id", "other")
    assert "'--id' must be an id" in cache.refusal(2, "import", file, "--id", "a b")
    assert cache.json("ls") == before


def test_a_damaged_export_is_not_imported(cache: Command, tmp_path: Path) -> None:
    file = tmp_path / "main.safetensors"
    cache.text("export", "main", str(file))
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100], whole[:-1] + bytes([whole[-1] ^ 1]), b"x" * 999):
        file.write_bytes(damaged)
        line = cache.refusal(1, "import", str(file), "--id", "new")
        assert f"{file} is not an exported conversation, or damaged" in line
    assert "No such file" in cache.refusal(2, "import", str(tmp_path / "none"))
    assert "damaged: io" in cache.refusal(1, "import", str(tmp_path))
    assert len(cache.ids()) == 4


def test_a_record_that_no_kvserve_writes_is_not_imported(cache: Command, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = await Store.open(tmp_path / "odd", identity=IDENTITY, limits=ROOMY)
        try:
            made = talks()["main"]
            odd = replace(made, head=replace(made.head, num_messages=0), messages=())
            await write(store, odd)
            file = tmp_path / "odd.safetensors"
            await write_whole(file, await store.export(ALICE, "main"), None, lambda *_: None)
        finally:
            await store.aclose()

    asyncio.run(scenario())
    file = str(tmp_path / "odd.safetensors")
    assert "not an exported conversation" in cache.refusal(1, "import", file, "--id", "odd")
    assert len(cache.json("ls")["items"]) == 4


def test_an_export_writes_over_nothing_unless_forced(cache: Command, tmp_path: Path) -> None:
    file = tmp_path / "main.safetensors"
    file.write_text("precious")
    assert "exists already" in cache.refusal(2, "export", "main", str(file))
    assert file.read_text() == "precious"
    cache.text("export", "main", str(file), "--force")
    assert file.stat().st_size > 10_000
    assert "is a folder" in cache.refusal(2, "export", "main", str(tmp_path), "--force")
    nowhere = tmp_path / "no" / "file"
    assert "its folder does not exist" in cache.refusal(2, "export", "main", str(nowhere))


def test_a_failed_export_leaves_the_old_file_and_no_part(cache: Command, tmp_path: Path) -> None:
    file = tmp_path / "main.safetensors"
    file.write_text("precious")
    damage(cache.snapshots()[0])
    for conversation in ("main", "fork", "other"):
        result = cache("export", conversation, str(file), "--force", "--api-key", "alice")
        if result.exit_code:
            assert result.exit_code == 1 and "damaged" in result.stderr
            assert file.read_text() == "precious"
            assert list(tmp_path.glob("*.part")) == []
            return
        file.write_text("precious")
    assert "damaged" in cache.refusal(1, "export", "other", str(file), "--force", "--tenant", "-")


# -- damage ------------------------------------------------------------------------------------


def damage(file: Path) -> None:
    """Flip a bit of the last byte."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def contents(folder: Path) -> dict[Path, bytes]:
    """Return all that verify must not change; SQLite's own files come and go."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "-" not in path.suffix and path.name != "lock"
    }


def test_verify_names_the_run_the_file_and_who_needs_it(cache: Command) -> None:
    assert cache.text("verify").endswith(": all well\n")
    [file] = [file for file in cache.snapshots() if file.name.endswith("-120.safetensors")][:1]
    damage(file)
    before = contents(cache.folder)
    result = cache("verify")
    assert result.exit_code == 1
    line, total = result.stdout.splitlines()
    assert file.name in line and "digest" in line and "needed by other" in line
    assert total.startswith("4 conversations, 5 files, ") and "1 fault" in total
    assert contents(cache.folder) == before
    assert json.loads(cache("verify", "--json").stdout)["problems"][0]["subject"] in line


def test_repair_takes_what_is_damaged_out_of_use(cache: Command) -> None:
    first, second, *_ = cache.snapshots()
    damage(first)
    second.unlink()
    stray = first.with_name(f"{first.name[:2]}{'0' * 30}-0.safetensors")
    stray.write_bytes(b"not a snapshot")
    assert cache("verify").exit_code == 1
    lines = cache.text("repair").splitlines()
    assert sum(line.startswith("run ") for line in lines) == 2
    assert any("put into quarantine" in line for line in lines)
    assert "all well" in cache.text("verify")
    assert first.name in {file.name for file in (cache.folder / "quarantine").iterdir()}
    assert len(cache.ids()) == 4, "a conversation is not lost with its state"
    assert not first.exists() and not stray.exists()


def test_an_index_that_is_damaged_is_made_again_by_repair_alone(cache: Command) -> None:
    index = cache.folder / "index.sqlite3"
    index.write_bytes(b"not a database" * 1000)
    for path in cache.folder.glob("index.sqlite3-*"):
        path.unlink()
    result = cache("verify")
    assert result.exit_code == 1 and result.stdout.startswith("index: damaged")
    for command in (*ALL, ["gc"]):
        assert "`kvserve cache repair` makes it again" in cache.refusal(1, *command)
    assert index.read_bytes().startswith(b"not a database")
    num_files = len(cache.snapshots())
    assert cache.text("repair").startswith("index: damaged")
    assert "all well" in cache.text("verify")
    assert cache.ids() == [] and len(cache.snapshots()) == num_files


def test_gc_removes_what_no_conversation_uses(cache: Command) -> None:
    assert cache.text("gc") == "0 files removed, 0 B\n"
    file = cache.snapshots()[0]
    stray = file.with_name(f"{file.name[:2]}{'0' * 30}-0.safetensors")
    stray.write_bytes(b"x" * 1500)
    assert cache.text("gc") == "1 file removed, 1.5 kB\n"
    assert cache.json("gc")["removed_files"] == 0 and not stray.exists()


# -- others at work ----------------------------------------------------------------------------


def test_a_store_that_another_process_works_on_is_left_alone(cache: Command) -> None:
    lock = StoreLock.acquire(cache.folder)
    try:
        for command in (*ALL, ["verify"], ["repair"], ["gc"]):
            line = cache.refusal(2, *command)
            assert "works on" in line and "try again when it is through" in line
        lock.announce("http://127.0.0.1:9")
        for command in ALL:
            assert "does not answer at http://127.0.0.1:9" in cache.refusal(2, *command)
        for name in ("repair", "gc"):
            assert f"`{name}` works on a stopped store only" in cache.refusal(2, name)
        assert "--api-key" in cache.refusal(2, "ls", "--tenant", "-")
        assert "all well" in cache.text("verify"), "reading disturbs nobody"
        file = cache.snapshots()[0]
        stray = file.with_name(f"{file.name[:2]}{'0' * 30}-0.safetensors")
        stray.write_bytes(b"a write that is under way")
        assert "all well" in cache.text("verify")
    finally:
        lock.release()
    assert cache("verify").exit_code == 1, "now nobody writes it"


def test_an_older_index_is_not_verified_and_not_changed(
    cache: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvserve.store import migrate

    monkeypatch.setattr(migrate, "is_current", lambda path: False)
    assert "earlier version" in cache.refusal(2, "verify")


def test_a_bad_setting_is_one_line(cache: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSERVE_PORT", "many")
    assert "KVSERVE_PORT" in cache.refusal(2, "ls")


def test_no_command_imports_mlx_or_the_web_server(cache: Command, tmp_path: Path) -> None:
    file = str(tmp_path / "main.safetensors")
    commands = [
        ["ls"],
        ["show", "main"],
        ["verify"],
        ["gc"],
        ["export", "main", file],
        ["import", file, "--id", "new"],
        ["pin", "main"],
        ["repair"],
    ]
    script = """
import sys, json
from kvserve.cli.main import app
for command in json.loads(sys.argv[1]):
    try:
        app(["cache", *command, "--data-dir", sys.argv[2]], standalone_mode=False)
    except SystemExit as end:
        assert not end.code, command
import kvserve.cli.cache.running
found = {"mlx", "mlx_lm", "transformers", "fastapi", "uvicorn"} & set(sys.modules)
sys.exit(" ".join(sorted(found)))
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, json.dumps(commands), str(cache.folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr.strip() == ""


def test_help_of_the_cache_imports_no_store() -> None:
    script = """
import sys
from kvserve.cli.main import app
app(["cache", "ls", "--help"], standalone_mode=False)
sys.exit(" ".join({"sqlalchemy", "httpx", "numpy", "rich.progress"} & set(sys.modules)))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.stderr.strip() == ""
