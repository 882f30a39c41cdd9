"""The lock of a data folder: one process at a time, whatever became of the one before."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvserve.store.errors import StoreError, StoreLocked
from kvserve.store.lock import Holder, StoreLock, read_holder

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from kvserve.store.lock import StoreLock
lock = StoreLock.acquire(Path(sys.argv[1]))
lock.announce("http://127.0.0.1:8123")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_in_words(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        with pytest.raises(StoreLocked) as caught:
            StoreLock.acquire(tmp_path)
        assert caught.value.message == (
            f"Another kvserve, process {process.pid}, works on this data folder and serves "
            "http://127.0.0.1:8123. Stop it first, or choose another folder with --data-dir."
        )
        assert read_holder(tmp_path) == Holder(process.pid, "http://127.0.0.1:8123")


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert read_holder(tmp_path) is None
        StoreLock.acquire(tmp_path).release()


def test_a_folder_can_be_locked_again_once_released(tmp_path: Path) -> None:
    assert read_holder(tmp_path) is None
    for _ in range(2):
        lock = StoreLock.acquire(tmp_path)
        assert read_holder(tmp_path) == Holder(os.getpid(), None)
        with pytest.raises(StoreLocked, match=f"process {os.getpid()}, works on"):
            StoreLock.acquire(tmp_path)
        lock.announce("http://127.0.0.1:12345/with/a/long/path")
        lock.announce("http://[::1]:8")
        assert read_holder(tmp_path) == Holder(os.getpid(), "http://[::1]:8")
        lock.release()
        lock.release()
        assert read_holder(tmp_path) is None


def test_the_lock_file_is_for_its_owner_only(tmp_path: Path) -> None:
    lock = StoreLock.acquire(tmp_path)
    try:
        assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600
    finally:
        lock.release()


def test_looking_does_not_keep_anyone_from_the_lock(tmp_path: Path) -> None:
    StoreLock.acquire(tmp_path).release()
    for _ in range(50):
        assert read_holder(tmp_path) is None
        StoreLock.acquire(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "url": 5}', "\xff"])
def test_an_unreadable_text_still_means_locked(tmp_path: Path, text: str) -> None:
    lock = StoreLock.acquire(tmp_path)
    try:
        (tmp_path / "lock").write_bytes(text.encode("latin-1"))
        assert read_holder(tmp_path) == Holder(None, None)
        with pytest.raises(StoreLocked, match="Another kvserve works on this data folder"):
            StoreLock.acquire(tmp_path)
    finally:
        lock.release()


def test_a_missing_folder_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened") as caught:
        StoreLock.acquire(tmp_path / "missing")
    assert not isinstance(caught.value, StoreLocked)
    assert read_holder(tmp_path / "missing") is None
