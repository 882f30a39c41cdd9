"""What identifies a model: each kind of change changes its own field, and nothing else counts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvserve import embedded
from kvserve.core.identity import ModelIdentity
from kvserve.engine.fingerprint import identify

TEMPLATE = "{{ messages }}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the embedded model, with every kind of file that a model may have."""
    folder = Path(shutil.copytree(embedded.path(), tmp_path / "model"))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "vocab.txt").write_bytes(b"a\nb\n")
    (folder / "merges.txt").write_bytes(b"a b\n")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}', "utf-8")
    (folder / "modeling.py").write_text("LAYERS = 4\n", "utf-8")
    (folder / "README.md").write_text("A model.", "utf-8")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes(b"adapter")
    (folder / "adapter_config.json").write_text('{"num_layers": 4}', "utf-8")
    return folder


def identity_of(folder: Path, **changes: Any) -> ModelIdentity:
    usual: dict[str, Any] = {"chat_template": TEMPLATE, "kv_dtype": "float32"}
    return identify(folder, **usual | changes)


def flip(path: Path, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)


def edit(path: Path, **changes: Any) -> None:
    """Set values in a JSON file; None takes them out."""
    values = json.loads(path.read_text("utf-8")) if path.exists() else {}
    values |= changes
    kept = {name: value for name, value in values.items() if value is not None}
    path.write_text(json.dumps(kept, indent=4), "utf-8")


def make_old(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))


AFFINE = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("weights", lambda f: flip(f / "model.safetensors", bit=3)),
        ("weights", lambda f: shutil.copy(f / "vocab.txt", f / "model-00002-of-00002.safetensors")),
        ("config", lambda f: edit(f / "config.json", rope_theta=1e6)),
        ("config", lambda f: edit(f / "config.json", rope_scaling={"factor": 2.0})),
        ("config", lambda f: edit(f / "config.json", text_config={"rope_theta": 1e6})),
        ("quantisation", lambda f: edit(f / "config.json", quantization=AFFINE)),
        ("quantisation", lambda f: edit(f / "config.json", quantization_config=AFFINE)),
        ("quantisation", lambda f: edit(f / "hf_quant_config.json", producer={"name": "modelopt"})),
        ("tokenizer", lambda f: flip(f / "tokenizer.json")),
        ("tokenizer", lambda f: flip(f / "tokenizer.model")),
        ("tokenizer", lambda f: flip(f / "vocab.txt")),
        ("tokenizer", lambda f: flip(f / "merges.txt")),
        ("tokenizer", lambda f: flip(f / "special_tokens_map.json")),
        ("tokenizer", lambda f: edit(f / "added_tokens.json", more=1536)),
        ("tokenizer", lambda f: edit(f / "tokenizer_config.json", add_bos_token=True)),
    ],
)
def test_a_change_of_a_file_changes_its_field_alone(
    folder: Path, field: str, change: Callable[[Path], object]
) -> None:
    before = identity_of(folder)
    change(folder)
    assert identity_of(folder).differences(before) == (field,)


def test_every_parameter_of_quantisation_counts(folder: Path) -> None:
    seen = {identity_of(folder).quantisation}
    assert seen == {"none"}
    for parameters in (AFFINE, AFFINE | {"bits": 8}, AFFINE | {"lm_head": {"bits": 8}}):
        edit(folder / "config.json", quantization=parameters)
        seen.add(identity_of(folder).quantisation)
    edit(folder / "config.json", quantization=None, text_config={"quantization": AFFINE})
    seen.add(identity_of(folder).quantisation)
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("chat_template", {"chat_template": TEMPLATE + " "}),
        ("chat_template", {"chat_template": {"default": TEMPLATE}}),
        ("chat_template", {"chat_template": None}),
        ("kv_dtype", {"kv_dtype": "bfloat16"}),
    ],
)
def test_what_was_loaded_changes_its_field_alone(
    folder: Path, field: str, change: dict[str, Any]
) -> None:
    assert identity_of(folder, **change).differences(identity_of(folder)) == (field,)


def test_a_new_meaning_of_stored_arrays_changes_the_layout_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identity_of(folder)
    monkeypatch.setattr("kvserve.engine.fingerprint.LAYOUT_VERSION", 1000)
    assert identity_of(folder).differences(before) == ("layout",)


def test_an_adapter_changes_its_field_alone(folder: Path, adapter: Path) -> None:
    seen = [identity_of(folder), identity_of(folder, adapter=adapter)]
    flip(adapter / "adapters.safetensors")
    seen.append(identity_of(folder, adapter=adapter))
    edit(adapter / "adapter_config.json", num_layers=8)
    seen.append(identity_of(folder, adapter=adapter))
    assert len({identity.adapter for identity in seen}) == 4
    assert all(identity.differences(seen[0]) == ("adapter",) for identity in seen[1:])


def test_python_files_count_where_they_are_the_model(folder: Path) -> None:
    inert, live = identity_of(folder), identity_of(folder, runs_own_code=True)
    assert live.differences(inert) == ("config",)
    flip(folder / "modeling.py")
    assert identity_of(folder) == inert
    assert identity_of(folder, runs_own_code=True).differences(live) == ("config",)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: (f / "README.md").write_text("Another text.", "utf-8"),
        lambda f: (f / "LICENSE.txt").write_text("MIT", "utf-8"),
        lambda f: edit(f / "generation_config.json", temperature=0.3, top_p=0.5),
        lambda f: edit(f / "config.json", transformers_version="9.9", _name_or_path="elsewhere"),
        lambda f: edit(f / "config.json"),  # written anew, with other spaces
        lambda f: edit(f / "config.json", quantization={}),
        lambda f: edit(f / "tokenizer_config.json", chat_template="not in effect"),
        lambda f: (f / "consolidated.safetensors").write_bytes(b"the vendor's own form"),
        lambda f: (f / "model.safetensors.index.json").write_text("{}", "utf-8"),
        lambda f: (f / "hf_quant_config.json").write_text("no JSON", "utf-8"),
        lambda f: (f / "a_folder.model").mkdir(),
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00001.safetensors"),
        lambda f: make_old(f),
    ],
)
def test_what_no_state_depends_on_changes_nothing(
    folder: Path, change: Callable[[Path], object]
) -> None:
    before = identity_of(folder)
    change(folder)
    assert identity_of(folder) == before


def test_a_copied_folder_is_the_same_model(folder: Path, adapter: Path, tmp_path: Path) -> None:
    memory = tmp_path / "fingerprints.json"
    before = identity_of(folder, adapter=adapter, memory=memory)
    copy, other = tmp_path / "a copy", tmp_path / "another"
    shutil.copytree(folder, copy)
    shutil.copytree(adapter, other)
    assert identity_of(copy, adapter=other, memory=memory) == before


def test_a_known_file_is_not_read_again_until_it_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "data" / "fingerprints.json"
    first = identity_of(folder, memory=memory)

    def no_reading(path: Path) -> str:
        raise AssertionError(f"{path.name} was read again")

    monkeypatch.setattr("kvserve.engine.fingerprint._digest", no_reading)
    assert identity_of(folder, memory=memory) == first
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(AssertionError, match=r"model\.safetensors was read again"):
        identity_of(folder, memory=memory)


def test_a_file_that_is_as_large_and_as_old_as_the_one_it_replaces_is_read(
    folder: Path, tmp_path: Path
) -> None:
    memory, path = tmp_path / "fingerprints.json", folder / "model.safetensors"
    before = identity_of(folder, memory=memory)
    times = path.stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity_of(folder, memory=memory).differences(before) == ("weights",)


def test_the_memory_holds_one_digest_for_each_file(folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "fingerprints.json"
    identity_of(folder, memory=memory)
    held = len(json.loads(memory.read_text("utf-8")))
    for bit in range(3):
        flip(folder / "model.safetensors", bit)
        identity_of(folder, memory=memory)
    assert len(json.loads(memory.read_text("utf-8"))) == held


def test_a_damaged_memory_of_digests_costs_hashing_only(folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "fingerprints.json"
    expected = identity_of(folder)
    for damage in (b"", b"[1]", b"\xff\xfe", b'{"a": '):
        memory.write_bytes(damage)
        assert identity_of(folder, memory=memory) == expected


def test_a_folder_that_cannot_be_written_costs_hashing_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    memory = tmp_path / "file" / "fingerprints.json"
    assert identity_of(folder, memory=memory) == identity_of(folder)
