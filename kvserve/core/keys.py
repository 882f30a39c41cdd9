"""Names of KV states, made from everything that a state depends on.

A key names the state after a sequence of tokens, whatever cuts led to it: splitting a segment
leaves every other key as it was, and two servers that cut differently agree on names. The hash
only finds; who uses a segment compares its token ids as well, because XXH3 is fast but does not
resist an attacker.
"""

from __future__ import annotations

import xxhash

from kvserve.core.types import TokenIds

Key = bytes
LAYOUT_VERSION = 1
"""Raised when the meaning of stored arrays changes; older states then become unreachable."""


def root_key(fingerprint: str, namespace: bytes) -> Key:
    """Return the key of the empty prefix for one model and one caller's namespace.

    `fingerprint` stands for weights, config, quantisation, adapter, tokenizer and KV dtype.
    Fields are length-prefixed, so that no two inputs run together into one.
    """
    hasher = xxhash.xxh3_128()
    for part in (b"kvserve", LAYOUT_VERSION.to_bytes(4, "little"), fingerprint.encode(), namespace):
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


def prefix_key(root: Key, token_ids: TokenIds) -> Key:
    """Return the key of the state after `token_ids` (all of them, from the root), 16 bytes.

    Ids go in as little-endian uint32, on any machine: keys outlive the process.
    """
    hasher = xxhash.xxh3_128(root)
    hasher.update(token_ids.astype("<u4", copy=False).tobytes())
    return hasher.digest()
