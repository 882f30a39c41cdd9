"""The guide's keys, bytes and columns are those of what is written."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import xxhash
from starlette.datastructures import Headers

from kvserve.api.identity import tenant_of
from kvserve.chat.request import namespace_of
from kvserve.core.identity import ModelIdentity
from kvserve.core.keys import LAYOUT_VERSION, prefix_key, root_key
from kvserve.store import snapshot_header
from kvserve.store.carried import carry
from kvserve.store.disk import Disk
from kvserve.store.folder import DataFolder
from kvserve.store.segments import ArraySpec, PackedSegment, SegmentSpec
from kvserve.store.snapshot import read_header, write_snapshot
from kvserve.store.snapshot_header import SnapshotHeader
from kvserve.store.tables import RunState, metadata
from kvserve.store.transfer import export_key
from kvserve.store.writer import Writer
from tests.docs.pages import GUIDE_PAGE, ROOT, code_in
from tests.store_fakes import conversation
from tests.unit.snapshot_fixtures import IDENTITY, ListSource

TOKENS = np.array([11, 12, 13], np.uint32)


def test_keys_are_made_as_the_guide_says() -> None:
    """Written out once more, from these lines of the guide and not from the code."""
    for line in (
        'tenant = "" without an API key, else the first 32 hex digits of'
        ' SHA-256("kvserve tenant" + 00 + the key)',
        "namespace = BLAKE2b-128(len(tenant) + tenant),"
        " with a cache_salt BLAKE2b-128(len(tenant) + tenant + 01 + salt)",
        'root key = XXH3-128(len("kvserve") + "kvserve" + 4 + layout version + 32 +'
        " identity's digest + len(namespace) + namespace)",
        "prefix key = XXH3-128(root key + token ids of [0, n))",
    ):
        assert line in re.sub(" +", " ", GUIDE_PAGE.text)

    def length(part: bytes) -> bytes:
        return len(part).to_bytes(8, "little")

    tenant = hashlib.sha256(b"kvserve tenant" + b"\0" + b"secret").hexdigest()[:32]
    assert tenant_of(Headers({"authorization": "Bearer secret"})) == tenant
    raw = tenant.encode()
    namespace = hashlib.blake2b(length(raw) + raw + b"\x01" + b"salt", digest_size=16).digest()
    assert namespace_of(tenant, "salt") == namespace
    assert namespace_of(tenant, None) == hashlib.blake2b(length(raw) + raw, digest_size=16).digest()
    digest = hashlib.blake2b(IDENTITY.to_json().encode(), digest_size=16).hexdigest()
    assert IDENTITY.digest() == digest and len(digest) == 32
    version = LAYOUT_VERSION.to_bytes(4, "little")
    parts = [b"kvserve", version, digest.encode(), namespace]
    root = xxhash.xxh3_128(b"".join(length(part) + part for part in parts)).digest()
    assert root_key(digest, namespace) == root
    key = xxhash.xxh3_128(root + TOKENS.astype("<u4").tobytes()).digest()
    assert prefix_key(root, TOKENS) == key
    assert export_key(IDENTITY, TOKENS) == xxhash.xxh3_128_digest(
        digest.encode() + TOKENS.tobytes()
    )


def test_the_identity_has_these_fields() -> None:
    said = [code_in(row[0])[0] for row in GUIDE_PAGE.table("field of the identity", "stands for")]
    assert said == [field.name for field in fields(ModelIdentity)]


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the guide shows: one segment of one span, of three tokens."""
    folder = DataFolder(tmp_path_factory.mktemp("data"))
    array = ArraySpec("BF16", (1, 1, 3, 2))
    tree = {"tuple": [{"array": 0}, {"array": 1}]}
    spec = SegmentSpec(0, 3, (array, array), [{"form": "span", "tree": tree, "tokens": 3}])
    numbers = np.array([[1, 2, 3, 4, 5, 6], [-1, -2, -3, -4, -5, -6]], "<f4")
    keys, values = (row.view("<u2")[1::2].tobytes() for row in numbers)
    namespace = namespace_of("", None)
    root = root_key(IDENTITY.digest(), namespace)
    header = SnapshotHeader(
        identity=IDENTITY,
        namespace=namespace,
        start=0,
        end=3,
        parent=b"",
        prefix=prefix_key(root, TOKENS[:0]),
        key=prefix_key(root, TOKENS),
        token_ids=TOKENS,
        segments=(spec,),
    )
    for path in folder.folders():
        path.mkdir(exist_ok=True)
    target = folder.of(f"{header.key.hex()}-0.safetensors")
    source = ListSource([PackedSegment(spec, [keys, values])])
    asyncio.run(write_snapshot(Disk(), header, source, target=target, drafts=folder.drafts))
    return target


def test_the_bytes_of_the_small_file_are_those_shown(small_file: Path) -> None:
    data = small_file.read_bytes()
    (shown,) = (block.text for block in GUIDE_PAGE.blocks if block.language == "hex")
    lines = [line for line in shown.splitlines() if line != "..."]
    assert len(lines) > 8
    for line in lines:
        at = int(line[:8], 16)
        assert line == _dump(data[at : at + 16], at)
    section = GUIDE_PAGE.section("## The file, byte by byte").text
    assert f"of {len(data)} bytes" in section
    assert f"`snapshots/{small_file.parent.name}/{small_file.name}`" in section
    length = int.from_bytes(data[:8], "little")
    assert f"N = {length} = {length:x} hexadecimal" in section
    assert f"8 + {length} = {8 + length} = {8 + length:x}" in section


def _dump(data: bytes, at: int) -> str:
    pairs = " ".join(data[i : i + 2].hex() for i in range(0, 16, 2))
    return f"{at:08x}: {pairs}  {''.join(chr(b) if 32 <= b < 127 else '.' for b in data)}"


def test_the_description_of_the_small_file_is_the_one_shown(small_file: Path) -> None:
    with safetensors.safe_open(small_file, "np") as file:
        own = json.loads(file.metadata()["kvserve"])
    (shown,) = (block.text for block in GUIDE_PAGE.blocks if block.language == "json")
    assert json.loads(shown) == own
    assert list(json.loads(shown)) == list(own)


def test_the_offsets_are_the_codes(small_file: Path) -> None:
    rows = GUIDE_PAGE.table("offset", "bytes", "what")
    data = small_file.read_bytes()
    opening = code_in(rows[1][2])[0].encode()
    assert data[8:].startswith(opening)
    digest_at = int(rows[2][0])
    assert [row[0] for row in rows] == ["0", "8", str(digest_at), str(digest_at + 32), "8 + N"]
    assert [row[1] for row in rows] == [
        "8",
        str(len(opening)),
        "32",
        f"N - {digest_at + 24}",
        "all others",
    ]
    assert digest_at == 8 + len(opening) == snapshot_header._DIGEST_AT
    length = 8 + int.from_bytes(data[:8], "little")
    head = data[:digest_at] + b"0" * 32 + data[digest_at + 32 : length]
    assert data[digest_at : digest_at + 32].decode() == xxhash.xxh3_128_hexdigest(head)


def test_the_fields_of_a_header_are_those_of_files(small_file: Path) -> None:
    header = read_header(Disk(), small_file)
    stored = _own(snapshot_header.encode(header))
    listed = [code_in(row[0])[0] for row in GUIDE_PAGE.table("field", "what")]
    record = carry(conversation("a", TOKENS))
    exported = SnapshotHeader(
        **{field.name: getattr(header, field.name) for field in fields(header)}
        | {"namespace": None, "conversation": record}
    )
    assert set(listed) == set(stored) | set(_own(snapshot_header.encode(exported)))
    assert set(listed) - set(stored) == {"conversation"}
    segment = [
        name for row in GUIDE_PAGE.table("field of a segment", "what") for name in code_in(row[0])
    ]
    assert segment == list(stored["segments"][0])
    section = GUIDE_PAGE.section("## The file, byte by byte").text
    said = section[section.index("An **export**") :]
    assert set(record) <= set(code_in(said))


def _own(raw: bytes) -> dict[str, Any]:
    own: dict[str, Any] = json.loads(json.loads(raw[8:])["__metadata__"]["kvserve"])
    return own


def test_every_column_has_its_line_and_no_other_has() -> None:
    listed = [code_in(row[0])[0] for row in GUIDE_PAGE.table("column", "what")]
    assert listed == [
        f"{table.name}.{column.name}"
        for table in metadata.tables.values()
        for column in table.columns
    ]
    states = next(row[1] for row in GUIDE_PAGE.table("column", "what") if "`runs.state`" in row[0])
    assert set(code_in(states)) == {str(state) for state in RunState}
    indexes = {index.name for table in metadata.tables.values() for index in table.indexes}
    said = {name for name in code_in(GUIDE_PAGE.prose) if re.match(r"(uq|ix)_", name)}
    assert said <= indexes and said


def test_the_data_folder_holds_what_is_listed() -> None:
    listed = {code_in(row[0])[0].rstrip("/") for row in GUIDE_PAGE.table("path", "what")}
    folder = DataFolder(Path("data"))
    parts = [
        folder.index,
        folder.drafts,
        folder.quarantine,
        folder.imports,
        folder.of("abc").parent,
    ]
    assert listed == {
        *(path.relative_to("data").as_posix() for path in parts),
        "lock",
        "fingerprints.json",
    }


def test_the_writer_is_waited_for_as_long_as_the_guide_says() -> None:
    default = inspect.signature(Writer.close).parameters["timeout_s"].default
    assert f"for at most {default:g} s " in GUIDE_PAGE.text


def test_the_reasons_of_damage_are_listed() -> None:
    source = "".join(
        (ROOT / f"kvserve/store/{name}.py").read_text()
        for name in ("snapshot", "store", "transfer", "opening")
    )
    raised = set(re.findall(r'SnapshotDamaged\(\s*[\w.]+,\s*"(\w+)"', source))
    section = GUIDE_PAGE.section("## Recovery").text
    said = re.search(r"failed a read \(([^)]*)\)", section)
    assert said is not None and set(code_in(said[1])) == raised
