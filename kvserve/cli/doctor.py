"""`kvserve doctor`: what this machine has of what kvserve needs.

Looks and reports, changes nothing. MLX is tried in a process of its own, because a build that does
not fit the machine may end the process that loads it, and finding that out is the purpose here.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from kvserve import __version__, config
from kvserve.core.memory import machine_memory

LIBRARIES = ("mlx", "mlx-lm", "transformers", "numpy", "fastapi", "uvicorn", "pydantic")
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja")
# Loading MLX takes about a second; a cold disk or a CUDA build that compiles at start, far longer.
MLX_TIMEOUT_S = 120.0
_TRY_MLX = """
from kvserve.core import blas
found = blas.preload()
import mlx.core as mx
assert mx.sum(mx.ones((8, 8)) @ mx.ones((8, 8))).item() == 512
print(mx.default_device().type.name)
print(found or "")
print(blas.describe())
"""


class Verdict(Enum):
    """What a finding means for the server; the value is the word printed."""

    OK = "ok"
    NOTE = "note"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    subject: str
    verdict: Verdict
    detail: str


def examine() -> list[Finding]:
    """Look at everything that the server needs; never raises for what is missing."""
    return [
        Finding("kvserve", Verdict.OK, __version__),
        _python(),
        Finding("platform", Verdict.OK, f"{platform.system()} {platform.machine()}"),
        *(_library(name) for name in LIBRARIES),
        *_mlx(),
        _memory(),
        _embedded_model(),
        _settings_and_data_dir(),
    ]


def report(findings: Iterable[Finding], console: Console | None = None) -> int:
    """Print `findings`; return the exit status, 1 if one is broken."""
    console = console or Console(highlight=False, soft_wrap=True)
    styles = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.BROKEN: "bold red"}
    broken = 0
    for finding in findings:
        word = f"{finding.verdict.value:<7}"
        broken += finding.verdict is Verdict.BROKEN
        console.print(
            f"[{styles[finding.verdict]}]{word}[/] {finding.subject:<14} {escape(finding.detail)}"
        )
    if broken:
        console.print(f"{broken} of these must be repaired before kvserve can serve.")
    return 1 if broken else 0


def _python() -> Finding:
    fits = (3, 11) <= sys.version_info < (3, 14)
    detail = platform.python_version() + ("" if fits else ", needed: 3.11 to 3.13")
    return Finding("python", Verdict.OK if fits else Verdict.BROKEN, detail)


def _library(name: str) -> Finding:
    try:
        return Finding(name, Verdict.OK, version(name))
    except PackageNotFoundError:
        return Finding(name, Verdict.BROKEN, "not installed")


def _mlx() -> list[Finding]:
    try:
        run = subprocess.run(
            [sys.executable, "-c", _TRY_MLX],
            capture_output=True,
            text=True,
            timeout=MLX_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [Finding("mlx device", Verdict.BROKEN, f"no answer in {MLX_TIMEOUT_S:.0f} s")]
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        return [Finding("mlx device", Verdict.BROKEN, f"MLX does not work here: {last}")]
    device, found, described = run.stdout.splitlines()[:3]
    slow = device == "cpu" and sys.platform == "linux" and not found
    return [
        judge_device(device, _installed("mlx-cuda-")),
        Finding("blas", Verdict.NOTE if slow else Verdict.OK, described),
    ]


def judge_device(device: str, cuda_builds: list[str]) -> Finding:
    """Tell whether `device`, "cpu" or "gpu", is what the installed builds of MLX promise.

    The wheels mlx-cpu and mlx-cuda-* hold the same file, so the one installed last decides, and
    pip installs mlx-cpu last.
    """
    if device == "cpu" and cuda_builds:
        remedy = f"pip install --force-reinstall --no-deps {cuda_builds[0]}"
        detail = f"cpu, although {cuda_builds[0]} is installed: no GPU, or mlx-cpu lies over it"
        return Finding("mlx device", Verdict.NOTE, f"{detail} (then: {remedy})")
    return Finding("mlx device", Verdict.OK, device)


def _installed(prefix: str) -> list[str]:
    names = {str(found.metadata["Name"]).lower().replace("_", "-") for found in distributions()}
    return sorted(name for name in names if name.startswith(prefix))


def _memory() -> Finding:
    gib = machine_memory() / (1 << 30)
    return Finding("memory", Verdict.OK, f"{gib:.1f} GiB for this process at most")


def _embedded_model() -> Finding:
    from kvserve import embedded

    files = [file for file in embedded.path().rglob("*") if file.suffix in MODEL_SUFFIXES]
    if not any(file.suffix == ".safetensors" for file in files):
        return Finding("embedded model", Verdict.BROKEN, "its weights are not in this installation")
    nbytes = sum(file.stat().st_size for file in files)
    return Finding("embedded model", Verdict.OK, f"{nbytes / 1e6:.1f} MB")


def _settings_and_data_dir() -> Finding:
    try:
        folder = config.load({}).data_dir
    except config.ConfigError as error:
        return Finding("settings", Verdict.BROKEN, str(error))
    existing: Path = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding("data folder", Verdict.BROKEN, f"{folder}: {existing} cannot be written to")
    state = "" if existing == folder else ", made when it is needed"
    return Finding("data folder", Verdict.OK, f"{folder}{state}")
