"""The header of a snapshot file, to bytes and back. Pure; owns nothing.

    offset        bytes
    0             8       N, the length of the header: unsigned, little-endian
    8             42      {"__metadata__":{"kvserve":"{\\"digest\\":\\"
    50            32      the header's digest in hexadecimal digits
    82            N - 74  the rest of the header: JSON in UTF-8, then spaces, so that 8 divides N
    8 + N                 the arrays, back to back, to the file's end

So it is a safetensors file, whose header is one JSON object: `__metadata__`, then for each array,
in the order of the bytes and without holes, `"<segment>/<i>": {"dtype", "shape", "data_offsets"}`,
both counted from 0. The text under `kvserve` is JSON again:

    digest        XXH3-128 of the bytes [0, 8 + N) with the 32 digits set to "0"
    format        1
    identity      the fields of `ModelIdentity`: what must be the same for the state to be used
    namespace     hexadecimal: whose state it is; absent in an exported conversation
    start, end    the tokens [start, end) of the prompt whose state this is
    parent        key of the run behind which this one was written; "" for one at the start
    prefix, key   keys of the states after `start` and after `end` tokens, hexadecimal
    tokens        the token ids of [start, end): uint32, little-endian, in base64
    segments      for each, end to end: start, end, arrays (their number), restorable, whole,
                  windows, layout (see `kvserve.store.layout`), digest (XXH3-128 of its arrays'
                  bytes)
    conversation  only in an exported conversation, see `kvserve.store.transfer`

Every byte of the file thus stands under a digest: a segment's bytes under the segment's, all else
under the header's. XXH3 finds accidents, not forgeries, so nothing that a header says is believed
for its digest: counts, sizes and types are checked against each other and against the file's size.
Where the digest stands is fixed so that it can be checked before anything is parsed.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import orjson
import xxhash

from kvserve.core.errors import TooLarge
from kvserve.core.identity import ModelIdentity
from kvserve.core.types import TokenIds
from kvserve.store.guards import size
from kvserve.store.layout import check_spec
from kvserve.store.segments import DTYPE_NBYTES, ArraySpec, SegmentSpec

FORMAT = 1
LENGTH_NBYTES = 8
MAX_HEADER_NBYTES = 64 * 2**20
"""Below the 100 MB that safetensors itself allows; two million tokens of a large model."""
MAX_HEADER_VALUES = 4_000_000
"""Of JSON, so that a hostile header of brackets cannot fill the memory when it is parsed."""

_OPENING = b'{"__metadata__":{"kvserve":"{\\"digest\\":\\"'
_DIGEST_AT = LENGTH_NBYTES + len(_OPENING)
_DIGEST_DIGITS = 32
_NO_DIGEST = "0" * _DIGEST_DIGITS
_ALIGNMENT = 8
_MAX_POSITION = 2**40
_MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotHeader:
    """What a file says of itself.

    `token_ids` are those of `[start, end)`. `digests` has one entry per segment, and is empty
    before the file is written. `namespace` is None and `conversation` given in an export only.
    """

    identity: ModelIdentity
    namespace: bytes | None
    start: int
    end: int
    parent: bytes
    prefix: bytes
    key: bytes
    token_ids: TokenIds
    segments: tuple[SegmentSpec, ...]
    digests: tuple[bytes, ...] = ()
    conversation: Mapping[str, Any] | None = None

    @property
    def data_nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def content_digest(self) -> bytes:
        """XXH3-128 of the segments' digests, by which the index knows what it has written."""
        return xxhash.xxh3_128_digest(b"".join(self.digests))

    def file_nbytes(self) -> int:
        """Return the exact size of the file, known before it is written."""
        return len(encode(self)) + self.data_nbytes


def encode(header: SnapshotHeader) -> bytes:
    """Return the bytes before the arrays; digests that are not known yet take the same room.

    Raises TooLarge for more than one file may describe, ValueError for what is not sound.
    """
    if len(header.token_ids) != header.end - header.start:
        raise ValueError(f"{len(header.token_ids)} tokens for [{header.start}, {header.end})")
    _check_order(header.start, header.end, header.segments)
    digests = [digest.hex() for digest in header.digests] or [_NO_DIGEST] * len(header.segments)
    own: dict[str, Any] = {
        "digest": _NO_DIGEST,
        "format": FORMAT,
        "identity": asdict(header.identity),
        "namespace": None if header.namespace is None else header.namespace.hex(),
        "start": header.start,
        "end": header.end,
        "parent": header.parent.hex(),
        "prefix": header.prefix.hex(),
        "key": header.key.hex(),
        "tokens": base64.b64encode(header.token_ids.astype("<u4", copy=False).tobytes()).decode(),
        "segments": [
            _segment_to_json(segment, digest)
            for segment, digest in zip(header.segments, digests, strict=True)
        ],
        "conversation": header.conversation,
    }
    own = {name: value for name, value in own.items() if value is not None}
    try:
        outer: dict[str, Any] = {"__metadata__": {"kvserve": orjson.dumps(own).decode()}}
    except TypeError as error:
        raise ValueError(f"this cannot be written as JSON: {error}") from error
    offset = 0
    for index, segment in enumerate(header.segments):
        for i, array in enumerate(segment.arrays):
            span = [offset, offset + array.nbytes]
            outer[f"{index}/{i}"] = {
                "dtype": array.dtype,
                "shape": array.shape,
                "data_offsets": span,
            }
            offset = span[1]
    text = orjson.dumps(outer)
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_NBYTES or _num_values(text) > MAX_HEADER_VALUES:
        raise TooLarge(
            f"{len(header.token_ids)} tokens of the conversation are too many for one file: to "
            f"describe them takes {size(len(text))} and {_num_values(text)} values, of which "
            f"{size(MAX_HEADER_NBYTES)} and {MAX_HEADER_VALUES} are allowed.",
            code="conversation_too_large",
        )
    raw = bytearray(len(text).to_bytes(LENGTH_NBYTES, "little") + text)
    assert raw.startswith(_OPENING, LENGTH_NBYTES)
    raw[_DIGEST_AT : _DIGEST_AT + _DIGEST_DIGITS] = xxhash.xxh3_128_hexdigest(raw).encode()
    return bytes(raw)


def header_nbytes(start: bytes | bytearray, file_nbytes: int) -> int:
    """Return how long the header is with its length, of a file with these first eight bytes.

    Raises ValueError if none of that length is allowed, EOFError if the file ends before.
    """
    length = int.from_bytes(start[:LENGTH_NBYTES], "little")
    if len(start) >= LENGTH_NBYTES and not len(_OPENING) < length <= MAX_HEADER_NBYTES:
        raise ValueError(f"its length cannot be {length}")
    if len(start) < LENGTH_NBYTES or LENGTH_NBYTES + length > file_nbytes:
        raise EOFError(f"the file ends after {file_nbytes} bytes, before the header does")
    return LENGTH_NBYTES + length


def decode(raw: bytes | bytearray, file_nbytes: int) -> SnapshotHeader:
    """Return the header in `raw`, which is as long as `header_nbytes` says.

    Raises EOFError if the file is too short for the arrays, ValueError for all else.
    """
    _check_digest(bytearray(raw))
    if _num_values(raw) > MAX_HEADER_VALUES:
        raise ValueError("it holds too many values")
    try:
        outer = orjson.loads(memoryview(raw)[LENGTH_NBYTES:])
        own = orjson.loads(outer.pop("__metadata__")["kvserve"])
        header = _header_from_json(own, outer)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it lacks or misuses a field: {error!r:.80}") from error
    expected = len(raw) + header.data_nbytes
    if file_nbytes < expected:
        raise EOFError(f"{file_nbytes} of {expected} bytes")
    if file_nbytes > expected:
        raise ValueError(f"the file has {file_nbytes - expected} bytes too many")
    return header


def _check_digest(raw: bytearray) -> None:
    if not raw.startswith(_OPENING, LENGTH_NBYTES):
        raise ValueError("this is not a snapshot")
    digits = slice(_DIGEST_AT, _DIGEST_AT + _DIGEST_DIGITS)
    written = bytes(raw[digits])
    raw[digits] = _NO_DIGEST.encode()
    if written != xxhash.xxh3_128_hexdigest(raw).encode():
        raise ValueError("it does not match its digest")


def _num_values(raw: bytes | bytearray) -> int:
    """Return a bound on the number of JSON values in a text; the text inside counts too."""
    return sum(raw.count(sign) for sign in (b",", b"[", b"{"))


def _check_order(start: int, end: int, segments: tuple[SegmentSpec, ...]) -> None:
    position = start
    for segment in segments:
        if segment.start != position or segment.end <= position:
            raise ValueError(f"a segment [{segment.start}, {segment.end}) at {position}")
        position = segment.end
        check_spec(segment)
    if position != end or not 0 <= start < end <= _MAX_POSITION:
        raise ValueError(f"segments up to {position} for [{start}, {end})")


def _segment_to_json(segment: SegmentSpec, digest: str) -> dict[str, Any]:
    return {
        "start": segment.start,
        "end": segment.end,
        "arrays": len(segment.arrays),
        "restorable": segment.restorable,
        "whole": segment.whole,
        "windows": {str(window): held for window, held in segment.windows.items()},
        "layout": segment.layout,
        "digest": digest,
    }


def _header_from_json(own: dict[str, Any], tensors: dict[str, Any]) -> SnapshotHeader:
    if own["format"] != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    start, end = _count(own["start"]), _count(own["end"])
    arrays = _arrays_from_json(tensors)
    segments: list[SegmentSpec] = []
    digests: list[bytes] = []
    taken = 0
    for segment in own["segments"]:
        stop = taken + _count(segment["arrays"])
        segments.append(_segment_from_json(segment, _take(arrays, taken, stop, len(segments))))
        digests.append(_hex(segment["digest"], _DIGEST_DIGITS))
        taken = stop
    if taken != len(arrays):
        raise ValueError(f"{len(arrays)} arrays, of which {taken} belong to segments")
    _check_order(start, end, tuple(segments))
    identity = own["identity"]
    if identity.keys() != {field.name for field in fields(ModelIdentity)} or not all(
        type(value) is str for value in identity.values()
    ):
        raise ValueError("its identity is not that of a model")
    conversation = own.get("conversation")
    if conversation is not None and type(conversation) is not dict:
        raise ValueError("its conversation is no object")
    return SnapshotHeader(
        identity=ModelIdentity(**identity),
        namespace=_hex(own["namespace"]) if "namespace" in own else None,
        start=start,
        end=end,
        parent=_hex(own["parent"]),
        prefix=_hex(own["prefix"]),
        key=_hex(own["key"]),
        token_ids=_tokens_from_json(own["tokens"], end - start),
        segments=tuple(segments),
        digests=tuple(digests),
        conversation=conversation,
    )


def _segment_from_json(segment: dict[str, Any], arrays: tuple[ArraySpec, ...]) -> SegmentSpec:
    restorable, whole = segment["restorable"], segment["whole"]
    if type(restorable) is not bool or type(whole) is not bool:
        raise ValueError("restorable and whole are true or false")
    return SegmentSpec(
        start=_count(segment["start"]),
        end=_count(segment["end"]),
        arrays=arrays,
        layout=segment["layout"],
        restorable=restorable,
        whole=whole,
        windows={int(window): _count(held) for window, held in segment["windows"].items()},
    )


def _arrays_from_json(tensors: dict[str, Any]) -> list[tuple[str, ArraySpec]]:
    """Return names and descriptions in order; each must begin where the one before ends."""
    arrays, offset = [], 0
    for name, tensor in tensors.items():
        dtype, shape = tensor["dtype"], tensor["shape"]
        if dtype not in DTYPE_NBYTES or type(shape) is not list or len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"array {name!r:.20} is of no known kind")
        array = ArraySpec(dtype, tuple(_count(size) for size in shape))
        if tensor["data_offsets"] != [offset, offset + array.nbytes]:
            raise ValueError(f"array {name!r:.20} does not lie where the one before ends")
        offset += array.nbytes
        arrays.append((name, array))
    return arrays


def _take(
    arrays: list[tuple[str, ArraySpec]], start: int, stop: int, segment: int
) -> tuple[ArraySpec, ...]:
    taken = arrays[start:stop]
    if stop > len(arrays) or [name for name, _ in taken] != [
        f"{segment}/{i}" for i in range(stop - start)
    ]:
        raise ValueError(f"the arrays of segment {segment} are not named in order")
    return tuple(array for _, array in taken)


def _tokens_from_json(text: str, num_tokens: int) -> TokenIds:
    # The length first: it is what decoding allocates.
    if type(text) is not str or len(text) != -(-num_tokens * 4 // 3) * 4:
        raise ValueError(f"not the text of {num_tokens} tokens")
    ids = np.frombuffer(base64.b64decode(text, validate=True), "<u4").astype(np.uint32, copy=False)
    if len(ids) != num_tokens:
        raise ValueError(f"not the text of {num_tokens} tokens")
    return ids


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_POSITION:
        raise ValueError("a count is missing or out of range")
    return value


def _hex(value: Any, num_digits: int | None = None) -> bytes:
    if type(value) is not str or (num_digits is not None and len(value) != num_digits):
        raise ValueError("hexadecimal digits are missing")
    return bytes.fromhex(value)
