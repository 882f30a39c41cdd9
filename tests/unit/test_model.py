"""Loading: what is refused in words, what identifies a model, what turns caching off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kvserve import embedded
from kvserve.engine import model as model_module
from kvserve.engine.model import ModelError, load, resolve
from kvserve.engine.selfcheck import caching_fault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the embedded model that a test may spoil."""
    return Path(shutil.copytree(embedded.path(), tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), "utf-8")


def test_a_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve(str(folder)) == folder


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none-such", "one-word", "a/b/c"])
def test_a_name_that_is_no_folder_and_no_hub_id_is_refused_in_words(name: str) -> None:
    with pytest.raises(ModelError, match="hub id like 'owner/name'"):
        resolve(name)


def test_a_hub_id_is_downloaded_to_the_folder_that_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(model_module, "snapshot_download", download)
    loaded = load(resolve("owner/name"), name="owner/name")
    assert loaded.info.name == "owner/name"
    assert [repo for repo, _ in asked] == ["owner/name"]
    assert "model*.safetensors" in asked[0][1]


def test_a_hub_that_cannot_be_reached_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def download(repo: str, **more: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(model_module, "snapshot_download", download)
    with pytest.raises(ModelError, match="could not be downloaded"):
        resolve("owner/name")


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path, name="x")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "config.json").write_text("{", "utf-8"),
        lambda f: edit_config(f, model_type="no_such_model"),
        lambda f: edit_config(f, hidden_size=64),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100),
        lambda f: (f / "tokenizer.json").write_text("[]", "utf-8"),
        lambda f: edit_config(f, model_type="olmo"),  # mlx-lm's file calls sys.exit
    ],
    ids=["json", "type", "shapes", "no weights", "bad weights", "tokenizer", "exit"],
)
def test_a_broken_model_is_refused_in_words(folder: Path, spoil: Any) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder, name="x")


def test_context_is_what_the_config_says_and_what_the_user_caps(folder: Path) -> None:
    stated = json.loads((folder / "config.json").read_text("utf-8"))["max_position_embeddings"]
    assert load(folder, name="x").info.context_length == stated
    assert load(folder, name="x", max_context=100).info.context_length == 100
    assert load(folder, name="x", max_context=10**9).info.context_length == stated


def test_weights_run_in_float32_on_the_cpu(folder: Path) -> None:
    loaded = load(folder, name="x")
    logits = loaded.forward(mx.array([[1, 2]]), cache=loaded.fresh_cache())
    assert mx.default_device() != mx.cpu or logits.dtype == mx.float32


def test_a_loaded_model_is_identified_by_its_files_and_by_what_was_loaded(folder: Path) -> None:
    info = load(folder, name="x").info
    assert info.fingerprint == info.identity.digest()
    assert info.identity.kv_dtype == "float32" or mx.default_device() != mx.cpu
    assert info.identity.quantisation == "none"
    assert info.identity.adapter == ""
    assert load(folder, name="another name", max_context=100).info.identity == info.identity


def test_the_template_that_counts_is_the_one_in_effect(folder: Path) -> None:
    apart = load(folder, name="x").info.identity
    template = (folder / "chat_template.jinja").read_text("utf-8")
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"chat_template": template}), "utf-8")
    assert load(folder, name="x").info.identity == apart
    path.write_text(json.dumps(config | {"chat_template": template + " "}), "utf-8")
    assert load(folder, name="x").info.identity.differences(apart) == ("chat_template",)


def test_dynamic_rope_scaling_turns_caching_off_loudly(folder: Path) -> None:
    edit_config(folder, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    config = json.loads((folder / "config.json").read_text("utf-8"))

    def never(*args: Any, **more: Any) -> Any:
        raise AssertionError("the config alone decides")

    assert "dynamic rope" in caching_fault(config, never, never, 10)


def test_a_model_whose_state_does_not_come_back_turns_caching_off_loudly(folder: Path) -> None:
    loaded = load(folder, name="x")
    fed = []

    def forgetful(tokens: mx.array, cache: Any) -> mx.array:
        fed.append(tokens.shape[1])  # logits that depend on how the prompt was cut
        return loaded.forward(tokens, cache=cache) + len(fed)

    assert "other logits" in caching_fault({}, forgetful, loaded.fresh_cache, loaded.vocab_size)
    assert caching_fault({}, loaded.forward, loaded.fresh_cache, loaded.vocab_size) == ""
