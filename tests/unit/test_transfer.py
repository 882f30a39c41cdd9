from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvserve.store.carried import MAX_MESSAGES, carry, unpack
from kvserve.store.disk import Disk
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.records import ConversationHead, StoredConversation, StoredMessage
from kvserve.store.segments import PackedSegment
from kvserve.store.slicing import slice_segment
from kvserve.store.snapshot import BLOCK_NBYTES, verify_file
from kvserve.store.snapshot_header import SnapshotHeader, decode, encode
from kvserve.store.transfer import ExportPart, Staged, open_export
from tests.unit.snapshot_fixtures import (
    IDENTITY,
    WINDOW,
    ListSource,
    bytes_of,
    expected_of,
    make_segment,
    make_spec,
    write_file,
)

NOW = datetime(2026, 5, 4, 12, 30, 1, 250, tzinfo=UTC)


def conversation(num_tokens: int) -> StoredConversation:
    head = ConversationHead(
        tenant="secret-tenant",
        id="chat-1",
        namespace=b"secret-namespace",
        model="a model",
        identity=IDENTITY,
        title="Wärme \ud83d",
        num_tokens=num_tokens,
        num_messages=2,
        tip=b"\x01" * 16,
        stem=b"\x02" * 16,
        saved=True,
        pinned=True,
        pinned_until=NOW,
        expires_at=NOW,
        created_at=NOW - timedelta(days=3),
        used_at=NOW,
    )
    return StoredConversation(
        head=head,
        tools_digest=b"\x03" * 16,
        template_digest=b"\x04" * 16,
        messages=[
            StoredMessage("user", b"\x05" * 16, 3),
            StoredMessage("assistant", b"\x06" * 16, None),
        ],
        token_ids=np.arange(num_tokens, dtype=np.uint32) * 7,
    )


def segment(start: int, end: int) -> PackedSegment:
    return make_segment(make_spec(start, end, window=WINDOW, state=True))


RUNS = [
    ([segment(0, 8), segment(8, 12)], 10),  # left inside its second segment
    ([segment(10, 11), segment(11, 30)], 30),
    ([segment(30, 40), segment(40, 50)], 40),  # its second segment is not on the path
]
TAKEN = [
    *(RUNS[0][0][0], slice_segment(RUNS[0][0][1], 8, 10)),
    *(*RUNS[1][0], RUNS[2][0][0]),
]


async def lay_out(folder: Path) -> list[ExportPart]:
    parts = []
    for run_id, (segments, end) in enumerate(RUNS, start=1):
        path, header = await write_file(folder, segments)
        parts.append(ExportPart(run_id=run_id, path=path, expected=expected_of(header), end=end))
    return parts


async def collect(folder: Path, parts: Sequence[ExportPart], num_tokens: int = 40) -> bytes:
    export = await open_export(Disk(), conversation(num_tokens), parts)
    blocks = [block async for block in export]
    assert all(0 < len(block) <= BLOCK_NBYTES for block in blocks)
    raw = b"".join(blocks)
    assert len(raw) == export.nbytes
    return raw


async def exported(folder: Path) -> bytes:
    return await collect(folder, await lay_out(folder))


def stage(folder: Path, raw: bytes) -> Path:
    path = folder / "upload"
    path.write_bytes(raw)
    return path


async def refusal(folder: Path, raw: bytes) -> str:
    """Return why an upload is refused."""
    with pytest.raises(SnapshotDamaged) as caught:
        async with Staged(Disk(), stage(folder, raw)):
            pass
    return caught.value.reason


def test_a_conversation_of_several_runs_travels_as_one_file(tmp_path: Path) -> None:
    async def travel() -> None:
        raw = await exported(tmp_path)
        path = stage(tmp_path, raw)
        verify_file(Disk(), path)
        async with Staged(Disk(), path) as staged:
            source = staged.source(0, 40)
            assert list(source.specs) == [segment.spec for segment in TAKEN]
            for index, segment in enumerate(TAKEN):
                found = PackedSegment(segment.spec, await source.data(index))
                assert bytes_of(found) == bytes_of(segment)
            assert staged.header.identity == IDENTITY
            there = staged.conversation(tenant="b", namespace=b"n", id="new", now=NOW)
        before = conversation(40)
        changes: dict[str, Any] = {"tenant": "b", "namespace": b"n", "id": "new"}
        changes |= {"title": "Wärme ?", "saved": False, "pinned": False}
        head = replace(before.head, pinned_until=None, expires_at=None, **changes)
        assert there.token_ids.tolist() == before.token_ids.tolist()
        assert replace(there, token_ids=before.token_ids) == replace(before, head=head)

    asyncio.run(travel())


def test_nothing_of_tenant_or_namespace_leaves(tmp_path: Path) -> None:
    raw = asyncio.run(exported(tmp_path))
    for secret in (b"secret", b"secret-namespace".hex().encode(), b"namespace"):
        assert secret not in raw


@pytest.mark.parametrize(("start", "end"), [(0, 40), (5, 33), (9, 10), (10, 40), (29, 31)])
def test_an_import_gives_exactly_the_missing_range(tmp_path: Path, start: int, end: int) -> None:
    async def give() -> None:
        async with Staged(Disk(), stage(tmp_path, await exported(tmp_path))) as staged:
            source = staged.source(start, end)
            position = start
            for index, spec in enumerate(source.specs):
                assert spec.start == position
                position = spec.end
                whole = next(s for s in TAKEN if s.spec.start <= spec.start < s.spec.end)
                wanted = slice_segment(whole, spec.start, spec.end)
                found = PackedSegment(spec, await source.data(index))
                assert spec == wanted.spec and bytes_of(found) == bytes_of(wanted)
            assert position == end

    asyncio.run(give())


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("run", [0, 1, 2])
def test_a_damaged_header_is_told_before_the_first_byte(tmp_path: Path, run: int) -> None:
    async def export() -> None:
        parts = await lay_out(tmp_path)
        flip(parts[run].path, 200)
        with pytest.raises(SnapshotDamaged) as caught:
            await open_export(Disk(), conversation(40), parts)
        assert caught.value.run_id == run + 1

    asyncio.run(export())


def test_a_run_of_other_tokens_is_not_exported(tmp_path: Path) -> None:
    async def export() -> None:
        parts = await lay_out(tmp_path)
        other = conversation(40)
        other.token_ids[25] += 1
        with pytest.raises(SnapshotDamaged, match="foreign"):
            await open_export(Disk(), other, parts)

    asyncio.run(export())


@pytest.mark.parametrize("fate", ["damaged", "removed", "replaced"])
@pytest.mark.parametrize("run", [0, 1, 2])
def test_a_run_that_fails_while_it_is_sent_breaks_the_stream_off(
    tmp_path: Path, run: int, fate: str
) -> None:
    async def export() -> None:
        parts = await lay_out(tmp_path)
        stream = await open_export(Disk(), conversation(40), parts)
        path = parts[run].path
        if fate == "damaged":
            flip(path, path.stat().st_size - sum(len(b) for b in RUNS[run][0][1].data) - 1)
        elif fate == "removed":
            path.unlink()
        else:
            shutil.copyfile(parts[run - 1].path, path)
        sent = b""
        with pytest.raises(SnapshotDamaged) as caught:  # noqa: PT012
            async for block in stream:
                sent += block
        assert caught.value.run_id == run + 1
        assert await refusal(tmp_path, sent) == "truncated"

    asyncio.run(export())


def test_a_reader_who_goes_leaves_no_file_open(tmp_path: Path) -> None:
    async def leave() -> None:
        parts = await lay_out(tmp_path)
        before = len(os.listdir("/dev/fd"))
        blocks = aiter(await open_export(Disk(), conversation(40), parts))
        await anext(blocks)
        await anext(blocks)
        assert len(os.listdir("/dev/fd")) == before + 1
        await blocks.aclose()  # type: ignore[attr-defined]
        assert len(os.listdir("/dev/fd")) == before

    asyncio.run(leave())


def test_a_refused_import_leaves_no_file_open(tmp_path: Path) -> None:
    async def refuse() -> None:
        before = len(os.listdir("/dev/fd"))
        raw = await exported(tmp_path)
        assert await refusal(tmp_path, raw[:-1]) == "truncated"
        assert await refusal(tmp_path, raw[:-1] + bytes([raw[-1] ^ 1])) == "digest"
        assert len(os.listdir("/dev/fd")) == before

    asyncio.run(refuse())


def test_verifying_an_upload_ends_soon_after_its_sender_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Disk):
        def read_some(self, fd: int, buffer: memoryview, offset: int) -> int:
            reads.append(offset)
            if len(reads) == 3:  # the header is read in two pieces
                begun.set()
                time.sleep(0.05)
            return super().read_some(fd, buffer, offset)

    reads: list[int] = []
    begun = threading.Event()
    monkeypatch.setattr("kvserve.store.transfer.AT_ONCE_NBYTES", 1)

    async def leave() -> None:
        path = stage(tmp_path, await exported(tmp_path))
        async with Staged(Slow(), path):
            whole = len(reads)
        reads.clear()
        begun.clear()
        entering = asyncio.ensure_future(Staged(Slow(), path).__aenter__())
        await asyncio.to_thread(begun.wait)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert len(reads) < whole - 1

    asyncio.run(leave())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_a_part_of_a_file_is_refused(tmp_path: Path, share: float) -> None:
    async def cut() -> None:
        raw = await exported(tmp_path)
        assert await refusal(tmp_path, raw[: int(len(raw) * share)]) == "truncated"

    asyncio.run(cut())


def test_other_files_are_refused(tmp_path: Path) -> None:
    async def check() -> None:
        path, _ = await write_file(tmp_path, RUNS[0][0])
        assert await refusal(tmp_path, path.read_bytes()) == "header"  # a run is no conversation
        assert await refusal(tmp_path, b"PK\x03\x04" + bytes(5000)) == "header"
        assert await refusal(tmp_path, bytes(5000)) == "header"
        assert await refusal(tmp_path, b"") == "truncated"

    asyncio.run(check())


def resigned(raw: bytes, **changes: Any) -> bytes:
    """Return an exported file whose header says something else, with a right digest."""
    length = 8 + int.from_bytes(raw[:8], "little")
    header: SnapshotHeader = replace(decode(raw[:length], len(raw)), **changes)
    return encode(header) + raw[length:]


GOOD = carry(conversation(40))


@pytest.mark.parametrize(
    "changes",
    [
        {"key": b"k" * 16},
        {"parent": b"p" * 16},
        {"prefix": b"p" * 16},
        {"namespace": b"n"},
        {"token_ids": np.arange(40, dtype=np.uint32)},
        {"identity": replace(IDENTITY, weights="others")},
        {"conversation": None},
        {"conversation": {}},
        *({"conversation": {**GOOD, name: None}} for name in GOOD if name != "title"),
        *({"conversation": {**GOOD, name: ["x"]}} for name in GOOD),
        {"conversation": {**GOOD, "title": "x" * 5000}},
        {"conversation": {**GOOD, "tip": "zz"}},
        {"conversation": {**GOOD, "tip": "ab" * 100}},
        {"conversation": {**GOOD, "created_at": "yesterday"}},
        {"conversation": {**GOOD, "created_at": "2026-05-04T12:00:00"}},
        {"conversation": {**GOOD, "created_at": "0001-01-01T00:00:00+14:00"}},
        {"conversation": {**GOOD, "messages": [{"role": "user", "digest": "00", "end": 41}]}},
        {"conversation": {**GOOD, "messages": [{"role": "user", "digest": "00", "end": -1}]}},
        {"conversation": {**GOOD, "messages": [{"role": "user", "digest": "00", "end": True}]}},
        {"conversation": {**GOOD, "messages": [{"role": 1, "digest": "00", "end": 1}]}},
    ],
)
def test_a_forged_header_is_refused_whatever_its_digest(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    async def forge() -> None:
        raw = await exported(tmp_path)
        assert await refusal(tmp_path, resigned(raw, **changes)) == "header"

    asyncio.run(forge())


def test_an_unchanged_header_signed_again_is_taken(tmp_path: Path) -> None:
    raw = asyncio.run(exported(tmp_path))
    assert resigned(raw) == raw


def test_a_record_of_more_messages_than_a_request_may_hold_is_refused() -> None:
    record = carry(conversation(40))
    record["messages"] = record["messages"][:1] * MAX_MESSAGES
    assert len(unpack(record, 40).messages) == MAX_MESSAGES
    record["messages"].append(record["messages"][0])
    with pytest.raises(ValueError, match="messages"):
        unpack(record, 40)


def test_messages_end_in_order() -> None:
    ends = [{"role": "user", "digest": "00", "end": end} for end in (5, 4)]
    with pytest.raises(ValueError, match="messages"):
        unpack({**GOOD, "messages": ends}, 40)


def test_a_file_from_the_future_was_not_made_after_now(tmp_path: Path) -> None:
    async def check() -> None:
        raw = await exported(tmp_path)
        late = {**GOOD, "created_at": "9999-12-31T23:59:59+00:00"}
        path = stage(tmp_path, resigned(raw, conversation=late))
        async with Staged(Disk(), path) as staged:
            there = staged.conversation(tenant="b", namespace=b"n", id="new", now=NOW)
            assert there.head.created_at == NOW

    asyncio.run(check())


def test_an_export_of_an_export_is_the_same(tmp_path: Path) -> None:
    async def again() -> None:
        raw = await exported(tmp_path)
        async with Staged(Disk(), stage(tmp_path, raw)) as staged:
            there = staged.conversation(tenant="b", namespace=b"n", id="chat-1", now=NOW)
            source = staged.source(0, 40)
            segments = [
                PackedSegment(spec, await source.data(i)) for i, spec in enumerate(source.specs)
            ]
        assert ListSource(segments).specs == source.specs
        path, header = await write_file(tmp_path / "second", segments)
        part = ExportPart(run_id=1, path=path, expected=expected_of(header), end=40)
        export = await open_export(Disk(), there, [part])
        assert b"".join([block async for block in export]) == raw

    asyncio.run(again())
