"""What a KV state depends on besides its tokens, and how two such descriptions differ. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """A digest or a short word for each thing that must be the same for a state to be used again.

    `weights`, `config`, `adapter` ("" without one), `tokenizer` and `chat_template` are hex
    digests; `quantisation` is "none" or a digest of its parameters; `kv_dtype` names the number
    format of keys and values; `layout` is the version of the meaning of stored arrays.
    """

    weights: str
    config: str
    quantisation: str
    adapter: str
    tokenizer: str
    chat_template: str
    kv_dtype: str
    layout: str

    def digest(self) -> str:
        """Return 32 hex digits that stand for all fields; equal for equal descriptions only."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def differences(self, other: ModelIdentity) -> tuple[str, ...]:
        """Return the names of the fields in which the two differ, in the order of the fields."""
        return tuple(
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the description written by `to_json`. Raises ValueError for anything else."""
        try:
            values = json.loads(text)
            if all(isinstance(value, str) for value in values.values()):
                return cls(**values)
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ValueError("this does not describe a model") from error
        raise ValueError("this does not describe a model")
