"""Settings come from flag, variable, file, default in this order; bad ones are named in a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kvserve import config
from kvserve.config import ConfigError, Settings, load, parse_size
from kvserve.core.memory import machine_memory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(flags: dict[str, Any], file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(flags, config=file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flag_beats_variable_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "k.toml", "port = 1\nmax_batch = 2\nmax_queue = 3\n")
    monkeypatch.setenv("KVSERVE_PORT", "11")
    monkeypatch.setenv("KVSERVE_MAX_BATCH", "12")
    settings = load({"port": "21"}, config=file)
    values = (settings.port, settings.max_batch, settings.max_queue, settings.segment_tokens)
    assert values == (21, 12, 3, 512)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1


def test_the_constructor_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSERVE_PORT", "11")
    assert Settings().port == 8000


def test_an_empty_variable_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSERVE_MODEL", "")
    assert load({}).model is None


def test_the_file_in_the_data_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path / "data" / "kvserve.toml", "port = 77")
    assert load({"data_dir": str(tmp_path / "data")}).port == 77
    assert load({"data_dir": str(tmp_path / "other")}).port == 8000


def test_the_file_can_be_named_by_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSERVE_CONFIG", str(write(tmp_path / "k.toml", "port = 78")))
    assert load({}).port == 78


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    assert "cannot be read" in refusal({}, tmp_path / "absent.toml")


def test_home_is_expanded_where_no_shell_did(tmp_path: Path) -> None:
    file = write(tmp_path / "k.toml", 'adapter = "~/a"\nmodel = "~/m"\n')
    settings = load({"data_dir": "~/d"}, config=file)
    paths = (settings.adapter, settings.model, settings.data_dir)
    assert paths == (tmp_path / "a", str(tmp_path / "m"), tmp_path / "d")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", "http"),
        ("host", ""),
        ("model", ""),
        ("segment_tokens", "15"),
        ("segment_tokens", "8193"),
        ("max_batch", "0"),
        ("max_queue", "0"),
        ("max_context", "1"),
        ("prefill_slice_ms", "0"),
        ("keep_alive_s", "nan"),
        ("keep_alive_s", "0"),
        ("auto_conversation", "sometimes"),
        ("caching", "perhaps"),
        ("verify_cache", "1.1"),
        ("verify_cache", "-0.1"),
        ("verify_cache", "nan"),
        ("log_level", "loud"),
        ("ram_budget", "4 apples"),
        ("ram_budget", "4"),
        ("ram_budget", "0%"),
        ("ram_budget", "101%"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_it_was_given_under(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "k.toml", f'{name} = "{value}"')
    assert refusal({name: value}).startswith(config.flag_of(name) + ": ")
    assert refusal({}, file).startswith(f"{name} in {file}: ")
    if value:
        monkeypatch.setenv("KVSERVE_" + name.upper(), value)
        assert refusal({}).startswith(f"KVSERVE_{name.upper()}: ")


def test_all_bad_values_are_named_at_once() -> None:
    text = refusal({"port": "x", "max_batch": "y"})
    assert "--port" in text
    assert "--max-batch" in text


def test_a_long_bad_value_is_shown_in_part() -> None:
    assert len(refusal({"port": "x" * 10_000})) < 200


def test_true_is_not_a_port(tmp_path: Path) -> None:
    assert refusal({}, write(tmp_path / "k.toml", "port = true")).startswith("port in ")


def test_an_unknown_name_in_the_file_is_refused_with_the_likely_one(tmp_path: Path) -> None:
    text = refusal({}, write(tmp_path / "k.toml", 'ram_bugdet = "4GB"'))
    assert "ram_bugdet in " in text
    assert "did you mean ram_budget?" in text


@pytest.mark.parametrize("content", [b"port = ", b"port = 1\nport = 2", b"\xff\xfe"])
def test_a_broken_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "k.toml").write_bytes(content)
    assert "not valid TOML" in refusal({}, tmp_path / "k.toml")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1048576", 1 << 20),
        (1048576, 1 << 20),
        ("512MiB", 512 << 20),
        ("4GB", 4 * 10**9),
        ("4 gib", 4 << 30),
        ("1.5TB", 15 * 10**11),
        ("2kB", 2000),
        ("40%", 400),
        ("100 %", 1000),
    ],
)
def test_sizes_are_read(text: str | int, nbytes: int) -> None:
    assert parse_size(text, whole=1000) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1e3", "nan", "inf", "4G", "4GBs", "٤GB", "1 2"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size such as 4GB"):
        parse_size(text, whole=1000)


def test_a_share_of_memory_is_a_share_of_this_machine() -> None:
    assert load({"ram_budget": "50%"}).ram_budget == machine_memory() // 2


@pytest.mark.parametrize(
    ("platform", "environ", "folder"),
    [
        ("linux", {}, "/home/u/.local/share/kvserve"),
        ("linux", {"XDG_DATA_HOME": "/x"}, "/x/kvserve"),
        ("linux", {"XDG_DATA_HOME": "relative"}, "/home/u/.local/share/kvserve"),
        ("darwin", {}, "/home/u/Library/Application Support/kvserve"),
    ],
)
def test_the_data_folder_is_where_the_platform_keeps_such_things(
    platform: str, environ: dict[str, str], folder: str
) -> None:
    assert config.default_data_dir(platform, environ, Path("/home/u")) == Path(folder)


def test_a_misspelt_variable_is_found() -> None:
    names = {"KVSERVE_PORT": "1", "KVSERVE_CONFIG": "f", "KVSERVE_PROT": "1", "HOME": "/"}
    assert config.unknown_variables(names) == ["KVSERVE_PROT"]


def test_the_readme_lists_every_setting_with_its_default() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| ([^|]*) \|", readme, re.MULTILINE))
    assert list(rows) == [config.flag_of(name)[2:] for name in Settings.model_fields]
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        if isinstance(default, str | int | float):
            assert rows[config.flag_of(name)[2:]].strip() == f"`{default}`", name
