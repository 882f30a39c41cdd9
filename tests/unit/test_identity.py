"""Descriptions of models: equal ones have equal digests, others differ by name."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.core.identity import ModelIdentity

NAMES = [field.name for field in fields(ModelIdentity)]
IDENTITIES = st.builds(ModelIdentity, **{name: st.text(max_size=40) for name in NAMES})


@given(IDENTITIES)
def test_a_description_comes_back_from_its_text(identity: ModelIdentity) -> None:
    assert ModelIdentity.from_json(identity.to_json()) == identity


@given(IDENTITIES, st.permutations(NAMES))
def test_the_order_of_names_in_the_text_does_not_count(
    identity: ModelIdentity, names: list[str]
) -> None:
    text = json.dumps({name: getattr(identity, name) for name in names}, indent=1)
    assert ModelIdentity.from_json(text).digest() == identity.digest()


@given(IDENTITIES, IDENTITIES)
def test_digests_are_equal_exactly_where_descriptions_are(
    one: ModelIdentity, other: ModelIdentity
) -> None:
    assert (one.digest() == other.digest()) == (one == other) == (not one.differences(other))
    assert one.differences(other) == other.differences(one)


@given(IDENTITIES, st.sets(st.sampled_from(NAMES)))
def test_what_differs_is_named_and_nothing_else(identity: ModelIdentity, names: set[str]) -> None:
    changes = {name: getattr(identity, name) + "'" for name in names}
    changed = replace(identity, **changes)
    assert identity.differences(changed) == tuple(name for name in NAMES if name in names)


def test_no_two_fields_run_together_into_one() -> None:
    one = ModelIdentity(**dict.fromkeys(NAMES, "") | {"weights": "ab"})
    other = ModelIdentity(**dict.fromkeys(NAMES, "") | {"weights": "a", "config": "b"})
    assert one.digest() != other.digest()


def test_the_digest_does_not_change_with_the_version_of_kvserve() -> None:
    # Snapshots on disk are found by it: a change here turns every stored conversation into a miss.
    identity = ModelIdentity(**{name: name for name in NAMES})
    assert identity.digest() == "d8896d9bbf651c9707140b3c850d7823"


GOOD = dict.fromkeys(NAMES, "")
VALUES: list[object] = [1, None, [], {}, True]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "[]", "1", '"weights"', "{}", "[" * 100_000, "\x00"),
        json.dumps(dict.fromkeys(NAMES[1:], "")),
        json.dumps(GOOD | {"another": ""}),
        *(json.dumps(GOOD | {"weights": value}) for value in VALUES),
    ],
    ids=lambda text: text[:30] or "nothing",
)
def test_what_describes_no_model_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="does not describe a model"):
        ModelIdentity.from_json(text)


def test_an_identity_without_a_field_cannot_be_made() -> None:
    with pytest.raises(TypeError):
        ModelIdentity(**dict.fromkeys(NAMES[1:], ""))
