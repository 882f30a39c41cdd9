"""`kvserve serve`: one flag for each setting, then the server.

Flags arrive as text and go to `kvserve.config` unread, which checks flags, variables and the file
alike; help texts and defaults are the settings' own. Owns no state.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kvserve import config
from kvserve.config import Settings


def _flag(name: str) -> Any:
    field = Settings.model_fields[name]
    default, text, decl = field.default, field.description or "", config.flag_of(name)
    if isinstance(default, bool):
        decl += f"/--no-{decl.removeprefix('--')}"
        default = "on" if default else "off"
    if isinstance(default, str | int | float):
        text += f" (default {default})"
    return typer.Option(decl, help=text, metavar="VALUE", show_default=False)


def serve(
    context: typer.Context,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help=f"TOML file of settings; by default {config.CONFIG_FILE} in the data folder.",
        ),
    ] = None,
    model: Annotated[str | None, _flag("model")] = None,
    adapter: Annotated[str | None, _flag("adapter")] = None,
    served_model_name: Annotated[str | None, _flag("served_model_name")] = None,
    host: Annotated[str | None, _flag("host")] = None,
    port: Annotated[str | None, _flag("port")] = None,
    data_dir: Annotated[str | None, _flag("data_dir")] = None,
    ram_budget: Annotated[str | None, _flag("ram_budget")] = None,
    persist: Annotated[str | None, _flag("persist")] = None,
    conversation_disk_max_gb: Annotated[str | None, _flag("conversation_disk_max_gb")] = None,
    disk_max_percent: Annotated[str | None, _flag("disk_max_percent")] = None,
    disk_budget: Annotated[str | None, _flag("disk_budget")] = None,
    disk_write_budget: Annotated[str | None, _flag("disk_write_budget")] = None,
    segment_tokens: Annotated[str | None, _flag("segment_tokens")] = None,
    max_batch: Annotated[str | None, _flag("max_batch")] = None,
    max_queue: Annotated[str | None, _flag("max_queue")] = None,
    prefill_slice_ms: Annotated[str | None, _flag("prefill_slice_ms")] = None,
    max_context: Annotated[str | None, _flag("max_context")] = None,
    auto_conversation: Annotated[str | None, _flag("auto_conversation")] = None,
    caching: Annotated[bool | None, _flag("caching")] = None,
    verify_cache: Annotated[str | None, _flag("verify_cache")] = None,
    keep_alive_s: Annotated[str | None, _flag("keep_alive_s")] = None,
    log_level: Annotated[str | None, _flag("log_level")] = None,
    log_content: Annotated[bool | None, _flag("log_content")] = None,
    trust_remote_code: Annotated[bool | None, _flag("trust_remote_code")] = None,
) -> None:
    """Start the server. Each flag is also a KVSERVE_ variable and a name in the TOML file."""
    flags = {name: value for name, value in context.params.items() if value is not None}
    flags.pop("config_file", None)
    try:
        settings = config.load(flags, config=config_file)
    except config.ConfigError as error:
        typer.echo(f"kvserve: {error}", err=True)
        raise typer.Exit(2) from None
    for name in config.unknown_variables(os.environ):
        typer.echo(f"kvserve: {name} is set, but names no setting; ignored", err=True)

    from kvserve.app import serve as run

    raise typer.Exit(run(settings))
