"""The command line parses, prints and exits; what it starts is replaced here."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import kvserve
from kvserve.cli import doctor
from kvserve.cli.doctor import Finding, Verdict
from kvserve.cli.main import app
from kvserve.cli.serve import serve
from kvserve.config import Settings, flag_of


class FakeApp(ModuleType):
    """Stands for `kvserve.app`: remembers the settings and returns `status`."""

    def __init__(self) -> None:
        super().__init__("kvserve.app")
        self.status = 0
        self.started: list[Settings] = []

    def serve(self, settings: Settings) -> int:
        self.started.append(settings)
        return self.status


@pytest.fixture
def fake_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApp:
    fake = FakeApp()
    monkeypatch.setitem(sys.modules, "kvserve.app", fake)
    monkeypatch.setattr(kvserve, "app", fake, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_every_setting_has_its_flag() -> None:
    names = [name for name in inspect.signature(serve).parameters if name != "context"]
    assert names == ["config_file", *Settings.model_fields]
    text = run("serve", "--help").stdout
    assert [flag_of(name) for name in Settings.model_fields if flag_of(name) not in text] == []


def test_without_flags_the_server_starts_with_the_defaults(fake_app: FakeApp) -> None:
    assert run("serve").exit_code == 0
    assert fake_app.started == [Settings()]


def test_flags_reach_the_server(fake_app: FakeApp, tmp_path: Path) -> None:
    file = tmp_path / "k.toml"
    file.write_text("max_batch = 3")
    result = run(
        *("serve", "--model", "m", "--port", "0", "--no-caching", "--log-content"),
        *("--ram-budget", "64MiB", "--config", str(file)),
    )
    assert result.exit_code == 0
    [settings] = fake_app.started
    assert (settings.model, settings.port, settings.ram_budget) == ("m", 0, 64 << 20)
    assert (settings.caching, settings.log_content, settings.max_batch) == (False, True, 3)


def test_the_exit_status_is_the_servers(fake_app: FakeApp) -> None:
    fake_app.status = 3
    assert run("serve").exit_code == 3


def test_a_bad_setting_is_one_line_and_no_server(fake_app: FakeApp) -> None:
    result = run("serve", "--port", "many")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert result.stderr.startswith("kvserve: --port: ")
    assert fake_app.started == []


def test_a_misspelt_variable_is_warned_of(
    fake_app: FakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSERVE_RAM_BUGDET", "1GB")
    result = run("serve")
    assert "KVSERVE_RAM_BUGDET" in result.stderr
    assert len(fake_app.started) == 1


def test_the_module_runs_and_says_its_version() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kvserve", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == f"kvserve {kvserve.__version__}\n"


def test_help_imports_no_heavy_library() -> None:
    script = """
import sys
from kvserve.cli.main import app
app(["serve", "--help"], standalone_mode=False)
sys.exit(" ".join({"mlx.core", "transformers", "fastapi", "numpy"} & set(sys.modules)))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.stderr.strip() == ""


def report(*findings: Finding) -> tuple[int, str]:
    out = io.StringIO()
    return doctor.report(
        findings, Console(file=out, highlight=False, soft_wrap=True)
    ), out.getvalue()


def test_doctor_exits_with_1_only_for_what_is_broken() -> None:
    good, note = Finding("a", Verdict.OK, "1"), Finding("b", Verdict.NOTE, "2")
    assert report(good, note)[0] == 0
    assert report(good, Finding("c", Verdict.BROKEN, "3"), note)[0] == 1


def test_doctor_is_plain_outside_a_terminal_and_keeps_brackets() -> None:
    assert report(Finding("a", Verdict.OK, "mlx[cpu]"))[1] == "ok      a              mlx[cpu]\n"


def test_doctor_names_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("kvserve-no-such-library",))
    [finding] = [found for found in doctor.examine() if found.subject == doctor.LIBRARIES[0]]
    assert finding.verdict is Verdict.BROKEN


@pytest.mark.parametrize(
    ("device", "builds", "verdict"),
    [
        ("cpu", [], Verdict.OK),
        ("gpu", [], Verdict.OK),
        ("gpu", ["mlx-cuda-12"], Verdict.OK),
        ("cpu", ["mlx-cuda-12"], Verdict.NOTE),
    ],
)
def test_doctor_sees_a_cuda_build_that_lies_under_the_cpu_build(
    device: str, builds: list[str], verdict: Verdict
) -> None:
    finding = doctor.judge_device(device, builds)
    assert finding.verdict is verdict
    assert ("--force-reinstall" in finding.detail) == (verdict is Verdict.NOTE)


@pytest.mark.parametrize(
    "ending", ["raise SystemExit('no such instruction')", "import os; os.abort()"]
)
def test_doctor_survives_an_mlx_that_does_not(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TRY_MLX", ending)
    [finding] = doctor._mlx()
    assert finding.verdict is Verdict.BROKEN


def test_doctor_says_when_the_data_folder_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVSERVE_DATA_DIR", str(tmp_path / "file" / "data"))
    finding = doctor._settings_and_data_dir()
    assert finding.verdict is Verdict.BROKEN
    assert "cannot be written to" in finding.detail


def test_doctor_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSERVE_DATA_DIR", str(tmp_path / "data"))
    assert doctor._settings_and_data_dir().verdict is Verdict.OK
    assert list(tmp_path.iterdir()) == []
