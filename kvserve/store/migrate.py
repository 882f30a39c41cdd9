"""Brings the index to the schema of this version, before anything else opens it.

State: none. Synchronous, for a worker thread, while the store is locked and nobody else is
connected. Looks first with `sqlite3` alone: an index that is current, as at nearly every start,
costs neither Alembic's import (0.3 s) nor a write. The steps are in `migrations/`, which lies
beside the package in a checkout and inside it in a wheel. Does not mend a damaged index.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import kvserve
from kvserve.store.errors import IndexDamaged, IndexFailed, SchemaTooNew

_SMALL_NBYTES = 64 * 2**20  # looked through in 0.1 s
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def migrations() -> Path:
    """Return the folder of the steps."""
    package = Path(kvserve.__file__).parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def upgrade(path: Path, *, steps: Path | None = None) -> bool:
    """Create the index at `path`, or carry an older one over; return whether anything was done.

    All or nothing, also when the process dies meanwhile. Raises SchemaTooNew for the index of a
    later version, IndexDamaged for a file that is no index or not whole, IndexFailed when it
    cannot be read or written now.
    """
    folder = steps if steps is not None else migrations()
    try:
        # The log and the shared memory beside the file get its permissions from SQLite.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        if is_current(path, steps=folder):
            return False
        _run_steps(path, folder)
    except sqlite3.Error as error:
        raise _failure(error) from error
    except OSError as error:
        raise IndexFailed(f"the index cannot be opened: {error.strerror}") from error
    return True


def is_current(path: Path, *, steps: Path | None = None) -> bool:
    """Whether the index at `path`, which is there, needs no step; changes nothing.

    Raises as `upgrade`.
    """
    known = revisions(steps if steps is not None else migrations())
    try:
        found = _revision(path)
    except sqlite3.Error as error:
        raise _failure(error) from error
    if found is not None and found not in known:
        raise SchemaTooNew(
            f"The index of saved conversations has schema {found}, this version of kvserve "
            f"({kvserve.__version__}) knows up to {known[-1]}. A later version has written "
            f"it: run that one, or give another folder with --data-dir."
        )
    return found == known[-1]


def revisions(folder: Path) -> list[str]:
    """Return the numbers of all steps in order, from the names of their files."""
    return sorted(file.name.partition("_")[0] for file in (folder / "versions").glob("*_*.py"))


def _revision(path: Path) -> str | None:
    """Return the number of the last step that was made, None for an index without tables."""
    # After a crash its log is still there: then, and while that costs little, look at every page.
    log = path.with_name(path.name + "-wal")
    looks = log.exists() or path.stat().st_size <= _SMALL_NBYTES
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        _make_durable(connection)
        found = [row[0] for row in connection.execute("PRAGMA quick_check(1)")] if looks else []
        if found not in ([], ["ok"]):
            raise IndexDamaged(found[0])
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        if not tables:
            return None
        if "alembic_version" not in tables:
            raise IndexDamaged("a database, but not an index of kvserve")
        rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
        if len(rows) != 1:
            raise IndexDamaged("the index does not say which schema it has")
        return str(rows[0][0])


def _run_steps(path: Path, folder: Path) -> None:
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import URL, NullPool, create_engine

    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool)
    with engine.connect() as connection:
        raw = connection.connection.dbapi_connection
        assert isinstance(raw, sqlite3.Connection)
        # Else the driver would commit before each change of the schema.
        raw.isolation_level = None
        raw.execute("PRAGMA journal_mode = WAL")
        _make_durable(raw)
        raw.execute("PRAGMA foreign_keys = OFF")  # tables may be copied; checked below
        config = Config()
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
        config.attributes["connection"] = connection
        with connection.begin():  # Alembic joins it
            raw.execute("BEGIN IMMEDIATE")
            command.upgrade(config, "head")
            if raw.execute("PRAGMA foreign_key_check").fetchone() is not None:
                raise IndexDamaged("rows refer to others that are not there")


def _make_durable(connection: sqlite3.Connection) -> None:
    """Let what is committed, or moved from the log into the file, reach the platter."""
    for setting in ("synchronous = FULL", "fullfsync = ON", "checkpoint_fullfsync = ON"):
        connection.execute(f"PRAGMA {setting}")


def _failure(error: sqlite3.Error) -> IndexFailed:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _DAMAGED:
        return IndexDamaged(str(error))
    return IndexFailed(str(error), full=code == sqlite3.SQLITE_FULL)
