"""The server's settings: typed, read once, frozen.

A value comes from the first of: a flag, a `KVSERVE_*` variable, the TOML file, the default. A bad
value or an unknown name is refused with one line that says where it stands; nothing is corrected
silently. This module reads the environment, the file and the machine's memory, and decides nothing
else: no part below `app` sees it, they are given plain values.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from kvserve.core.memory import machine_memory
from kvserve.store.guards import Limits

ENV_PREFIX = "KVSERVE_"
CONFIG_FILE = "kvserve.toml"
# A budget this small cannot hold one segment of any model; it is "4" typed for "4GB".
MIN_RAM_BUDGET = MIN_DISK_SIZE = 1 << 20

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


class ConfigError(Exception):
    """The settings cannot be used; the message is one line that names the setting."""


def parse_size(text: str | int, *, whole: int) -> int:
    """Return the number of bytes meant by 1048576, "512MiB", "1.5GB" or "40%" of `whole` bytes.

    Raises ValueError for anything else. kB, MB, GB, TB are powers of 1000, KiB to TiB of 1024.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-z]*)\s*", str(text), re.IGNORECASE | re.ASCII)
    if match is not None:
        number, unit = float(match[1]), match[2].lower()
        if unit == "%" and 0 < number <= 100:
            return int(whole * number / 100)
        if unit in _UNITS:
            return int(number * _UNITS[unit])
    raise ValueError("should be a size such as 4GB, 512MiB or 40% (of the machine's memory)")


def default_data_dir(platform: str, environ: Mapping[str, str], home: Path) -> Path:
    """Return the folder in which the platform keeps a user's application data."""
    if platform == "darwin":
        return home / "Library" / "Application Support" / "kvserve"
    base = Path(environ.get("XDG_DATA_HOME", ""))
    return (base if base.is_absolute() else home / ".local" / "share") / "kvserve"


def _parse_disk_size(value: Any) -> Any:
    if not isinstance(value, str | int):
        return value
    if isinstance(value, str) and value.strip().endswith("%"):
        raise ValueError("should be a size such as 50GB or 512MiB")
    nbytes = parse_size(value, whole=0)
    if nbytes < MIN_DISK_SIZE:
        raise ValueError(f"should be at least 1MiB, not {nbytes} bytes")
    return nbytes


def _parse_ram_budget(value: Any) -> Any:
    if not isinstance(value, str | int):
        return value
    nbytes = parse_size(value, whole=machine_memory())
    if nbytes < MIN_RAM_BUDGET:
        raise ValueError(f"should be at least 1MiB, not {nbytes} bytes")
    return nbytes


class Settings(BaseSettings):
    """All settings, checked. `Settings()` is the defaults; `load` is what reads flags and files."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    model: str | None = Field(
        default=None,
        min_length=1,
        description="Model to serve: a folder or a Hugging Face id; without it the embedded one.",
    )
    adapter: Path | None = Field(
        default=None, description="Folder of a LoRA adapter to put on the model."
    )
    served_model_name: str | None = Field(
        default=None, min_length=1, description="Name of the model in the API; by default its own."
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one."
    )
    data_dir: Path = Field(
        default_factory=lambda: default_data_dir(sys.platform, os.environ, Path.home()),
        description=f"Folder for what outlives the server, and for {CONFIG_FILE} "
        "(default: where the platform keeps application data).",
    )
    ram_budget: Annotated[int | None, BeforeValidator(_parse_ram_budget)] = Field(
        default=None,
        description="Most memory for conversation state: 4GB, 512MiB, or 40% of the machine's; "
        "by default half of what the model leaves.",
    )
    persist: Literal["auto", "manual", "off"] = Field(
        default="auto",
        description="When conversations are written to disk: behind each turn, when they are "
        "saved by order, or never.",
    )
    conversation_disk_max_gb: float = Field(
        default=200.0,
        gt=0,
        allow_inf_nan=False,
        description="Most GiB that one conversation may take on disk.",
    )
    disk_max_percent: float = Field(
        default=90.0,
        gt=0,
        le=100,
        allow_inf_nan=False,
        description="How full the disk may become by what is written.",
    )
    disk_budget: Annotated[int | None, BeforeValidator(_parse_disk_size)] = Field(
        default=None,
        description="Most disk for all conversations, such as 50GB; by default as the other "
        "limits allow.",
    )
    disk_write_budget: Annotated[int | None, BeforeValidator(_parse_disk_size)] = Field(
        default=None,
        description="Most that may be written to disk in a day, such as 100GB; by default "
        "unlimited.",
    )
    segment_tokens: int = Field(
        default=512,
        ge=16,
        le=8192,
        description="Longest segment of a message that is kept as one piece.",
    )
    max_batch: int = Field(default=16, ge=1, le=1024, description="Most replies generated at once.")
    max_queue: int = Field(
        default=64, ge=1, le=100_000, description="Most requests that wait; more are answered 429."
    )
    prefill_slice_ms: int = Field(
        default=250,
        ge=10,
        le=60_000,
        description="Longest time for which reading a prompt may hold up running replies.",
    )
    max_context: int | None = Field(
        default=None,
        ge=16,
        description="Most tokens of prompt and reply; by default the model's own.",
    )
    auto_conversation: Literal["content", "client", "off"] = Field(
        default="content",
        description="How a request without a conversation id finds its conversation.",
    )
    caching: bool = Field(default=True, description="Reuse conversation state.")
    verify_cache: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of reused states that is computed again, in idle time, and compared.",
    )
    keep_alive_s: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="Seconds between signs of life on a stream whose prompt is being read.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe messages to log."
    )
    log_content: bool = Field(
        default=False, description="Let logs hold what users and models wrote."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model or its tokenizer."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any) -> Any:
        # TOML's `true` would else be port 1.
        if isinstance(value, bool):
            return "true" if value else "false"
        return value

    @field_validator("model", "adapter", "data_dir")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        # No shell has expanded what stands in a file or a variable.
        return value if value is None else type(value)(os.path.expanduser(value))

    @field_validator("log_level", "auto_conversation", "persist", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    def disk_limits(self) -> Limits:
        """Return what may be written to disk."""
        return Limits(
            save_nbytes=round(self.conversation_disk_max_gb * (1 << 30)),
            disk_share=self.disk_max_percent / 100,
            store_nbytes=self.disk_budget,
            daily_nbytes=self.disk_write_budget,
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the constructor alone, so that `load` knows where each came from."""
        return (init_settings,)


def load(flags: Mapping[str, Any], *, config: Path | None = None) -> Settings:
    """Read the settings from `flags`, the environment and the TOML file; raise ConfigError.

    `flags` holds only what was given, by the settings' names. `config` (or `KVSERVE_CONFIG`) must
    exist; without it `kvserve.toml` in the data folder is read if there.
    """
    env = EnvSettingsSource(Settings)()
    origins = {name: f"{ENV_PREFIX}{name.upper()}" for name in env}
    origins |= {name: flag_of(name) for name in flags}
    if config is None and os.environ.get(ENV_PREFIX + "CONFIG"):
        config = Path(os.environ[ENV_PREFIX + "CONFIG"]).expanduser()
    above_file = {**env, **flags}
    if config is None:
        config = _check(_only(above_file, "data_dir"), origins, "").data_dir / CONFIG_FILE
        file = _read_toml(config) if config.is_file() else {}
    else:
        file = _read_toml(config)
    return _check({**file, **above_file}, origins, f" in {config}")


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the `KVSERVE_*` variables that set nothing; likely typing errors, worth a warning.

    They are not refused: container platforms make such names up from a service called kvserve.
    """
    known = {"CONFIG", "PYTHON", *(name.upper() for name in Settings.model_fields)}
    return sorted(
        name
        for name in environ
        if name.startswith(ENV_PREFIX) and name.removeprefix(ENV_PREFIX) not in known
    )


def flag_of(name: str) -> str:
    """Return the command line's name of a setting: `data_dir` is `--data-dir`."""
    return "--" + name.replace("_", "-")


def _only(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: values[name]} if name in values else {}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    for name in values:
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name} in {path}: no such setting{hint}")
    return values


def _check(values: Mapping[str, Any], origins: Mapping[str, str], elsewhere: str) -> Settings:
    """Return the checked settings; `origins` names where a value stands, else `elsewhere` does."""
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False, include_context=False):
            name = str(problem["loc"][0])
            text = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
            given = repr(values.get(name, problem["input"]))
            given = given if len(given) <= 60 else given[:57] + "..."
            lines.append(f"{origins.get(name, name + elsewhere)}: {text}, got {given}")
        raise ConfigError("; ".join(lines)) from error
