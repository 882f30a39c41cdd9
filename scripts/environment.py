"""Make a virtual environment that holds what a lock file pins, and the project.

Run as `python -m scripts.environment FOLDER LOCK` from the repository's root, with the standard
library alone. State: the folder, a stamp in it that says what was installed last, and a lock file
beside it. The environment is made once and left alone while the stamp fits; of two runs at once
the second waits for the first. It never touches a folder that is not its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME_FILE = ".kvserve-home"
# Quiet twice: errors alone, without a warning for each mirror that lacks a package.
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq")


def say(text: str) -> None:
    """Print one line about progress; standard output stays free for the program itself."""
    print(f"kvserve: {text}", file=sys.stderr, flush=True)


def python_in(folder: Path) -> Path:
    return folder / "bin" / "python"


def stamp_of(*inputs: Path) -> str:
    """Return a digest of the files that decide what is installed."""
    digest = hashlib.sha256()
    for path in inputs:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the one right to change `folder`; the system drops it when the process dies."""
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run is preparing {folder.name}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_usable(folder: Path) -> bool:
    """Tell whether the environment was made for this place and its interpreter still starts.

    The programs in it hold absolute paths, so one that was moved or copied here is of no use.
    """
    try:
        home = (folder / HOME_FILE).read_text()
        run = subprocess.run([python_in(folder), "-I", "-c", ""], capture_output=True, check=False)
    except OSError:
        return False
    return home == str(folder) and run.returncode == 0


def install(folder: Path, steps: Sequence[Sequence[str | Path]]) -> None:
    """Run pip in `folder` once per step; raise CalledProcessError at the first that fails."""
    for step in steps:
        subprocess.run([python_in(folder), *PIP, *step], cwd=ROOT, check=True)


def prepare(folder: Path, name: str, stamp: str, steps: Sequence[Sequence[str | Path]]) -> None:
    """Bring `folder` to what `stamp` stands for by pip's `steps`; call it under `locked`.

    One folder can hold several sets of packages; `name` is the set's.
    """
    stamp_file = folder / f".kvserve-{name}"
    if not is_usable(folder):
        say(f"making {folder.name} with Python {sys.version.split()[0]}")
        venv.create(folder, clear=True, with_pip=True)
        (folder / HOME_FILE).write_text(str(folder))
    if stamp_file.exists() and stamp_file.read_text() == stamp:
        return
    say(f"installing into {folder.name} (the first time takes a minute or two)")
    install(folder, steps)
    stamp_file.write_text(stamp)


def main(arguments: Sequence[str]) -> int:
    folder, lock = ROOT / arguments[0], ROOT / arguments[1]
    steps: list[list[str | Path]] = [
        ["--requirement", lock],
        ["--no-deps", "--no-build-isolation", "--editable", ROOT],
    ]
    try:
        with locked(folder):
            prepare(folder, lock.stem, stamp_of(lock, ROOT / "pyproject.toml"), steps)
    except subprocess.CalledProcessError as error:
        say(f"pip could not install into {folder.name} (its exit status: {error.returncode})")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
