"""Documents of facts, and lists: what a conversation may be asked about.

A document repeats its entities and attributes, so that most facts have neighbours that differ in
one of the two. `Document` owns the facts while it is written; afterwards its conversation does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .facts import VERBS, Fact, attribute_relation, choose_statement, invented_fact
from .phrases import LIST_PREFIXES
from .words import FOODS, Words, capitalised

RECENT = 6  # entities that a further fact may be about
LEAST_FOR_LIST = 60  # tokens of a document that may hold a list


@dataclass(frozen=True)
class Difficulty:
    """What makes a document easy or hard to ask about; the default is what is measured.

    `ease` is the share of facts that are worded as they will be asked; absent facts are asked less
    often by the same share. `siblings` is the share of facts that repeat the attribute of an
    earlier one about an entity that differs in one word ("the blue door", "the red door").
    """

    ease: float = 0.4
    siblings: float = 0.2


class Document:
    """Writes one document of about `num_tokens`.

    Afterwards `text` holds it, `facts` what it states, and `items` the list in it, if any.
    """

    def __init__(
        self,
        rng: random.Random,
        words: Words,
        measure: Callable[[str], int],
        num_tokens: int,
        difficulty: Difficulty,
    ) -> None:
        self._rng = rng
        self._words = words
        self._difficulty = difficulty
        ease = difficulty.ease
        self.facts: dict[tuple[str, str], Fact] = {}
        self.items: list[str] = []
        self._attributes: list[tuple[str, str]] = []
        self._entities: list[str] = []
        self._layout = rng.choice(
            ("bullets", "bullets", "lines", "prose", "prose", "numbers", "records")
        )
        if ease and rng.random() < ease:
            self._layout = rng.choice(("bullets", "lines", "prose"))
        filler_share = rng.choice((0.0, 0.0, 0.1, 0.3))
        list_share = 0.15 if num_tokens > LEAST_FOR_LIST else 0.0
        # Some documents word all their facts in one way.
        self._habit = rng.randrange(11) if rng.random() < 0.3 * (1 - ease) else -1
        self._reuse_entity, self._reuse_attribute = rng.uniform(0.1, 0.7), rng.uniform(0.1, 0.8)
        lines: list[str] = []
        size = 0
        while size < num_tokens:
            line = words.filler() if rng.random() < filler_share else self._next_facts()
            if line:
                lines.append(line)
                size += measure(line) + 2
        if rng.random() < list_share:
            place = rng.randrange(len(lines) + 1)
            self.items, text = draw_list(rng, words)
            lines.insert(place, text)
        self.text = self._laid_out(lines)

    def _next_facts(self) -> str:
        """Return a line that states a new fact, or a record of several; empty if none is new."""
        rng, siblings = self._rng, self._difficulty.siblings
        if siblings and self.facts and self._layout != "records" and rng.random() < siblings:
            return self._sibling_sentence()
        if self._entities and rng.random() < self._reuse_entity:
            entity = rng.choice(self._entities[-RECENT:])
        else:
            entity = self._words.entity()
        line = self._record(entity) if self._layout == "records" else self._sentence(entity)
        if line:
            self._entities.append(entity)
        return line

    def _record(self, entity: str) -> str:
        rng = self._rng
        lines = [f"{capitalised(entity)}:" if rng.random() < 0.5 else f"## {entity}"]
        for _ in range(rng.randint(1, 5)):
            fact = self._attribute_fact(entity, self._reuse_attribute)
            if fact.key not in self.facts:
                self.facts[fact.key] = fact
                lines.append(f"- {fact.relation.name}: {fact.value}")
        return "\n".join(lines) if len(lines) > 1 else ""

    def _sibling_sentence(self) -> str:
        elder = self._rng.choice(list(self.facts.values()))
        entity, kind = self._words.sibling(elder.entity), elder.relation.kind
        if any(elder.relation is third for third, _ in VERBS):
            relation = elder.relation
        else:
            relation = attribute_relation(elder.relation.name, kind, entity)
        return self._stated(Fact(relation, entity, self._words.value_for(entity, kind)))

    def _sentence(self, entity: str) -> str:
        if self._attributes and self._rng.random() < self._reuse_attribute:
            return self._stated(self._attribute_fact(entity, 1.0))
        return self._stated(invented_fact(self._rng, self._words, entity))

    def _stated(self, fact: Fact) -> str:
        """Return the sentence for `fact`, or nothing if the document has a fact of its key."""
        rng = self._rng
        if fact.key in self.facts:
            return ""
        self.facts[fact.key] = fact
        statements = fact.relation.statements
        if 0 <= self._habit < len(statements):
            template = statements[self._habit]
        else:
            template = choose_statement(rng, fact.relation, self._difficulty.ease)
        if fact.relation not in [third for third, _ in VERBS]:
            self._attributes.append((fact.relation.name, fact.relation.kind))
        return capitalised(fact.state(template))

    def _attribute_fact(self, entity: str, reuse: float) -> Fact:
        if self._attributes and self._rng.random() < reuse:
            attribute, kind = self._rng.choice(self._attributes)
        else:
            attribute, kind = self._words.attribute()
            self._attributes.append((attribute, kind))
        relation = attribute_relation(attribute, kind, entity)
        return Fact(relation, entity, self._words.value_for(entity, kind))

    def _laid_out(self, lines: list[str]) -> str:
        rng = self._rng
        if self._layout == "bullets":
            mark = rng.choice(("- ", "- ", "* "))
            return "\n".join(f"{mark}{line}" if "\n" not in line else line for line in lines)
        if self._layout == "numbers":
            return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
        if self._layout == "prose":
            text = ""
            for line in lines:
                if "\n" in line:
                    text = f"{text.rstrip()}\n\n{line}\n\n"
                    continue
                ended = line if line[-1] in ".!?" else f"{line}."
                text += ended + ("\n\n" if rng.random() < 0.12 else " ")
            return text.strip()
        return "\n".join(lines)


def draw_list(rng: random.Random, words: Words) -> tuple[list[str], str]:
    """Return three to nine different items, and the text that lists them."""
    maker = rng.choice((words.word, words.word, words.phrase, lambda: rng.choice(FOODS)))
    items: list[str] = []
    for _ in range(rng.randint(3, 9)):
        item = maker()
        if item not in items:
            items.append(item)
    style = rng.choice(("bullets", "bullets", "numbers", "commas", "lines"))
    prefix = rng.choice(LIST_PREFIXES)
    if style == "commas":
        return items, f"{prefix} {', '.join(items)}."
    if style == "bullets":
        return items, "\n".join([prefix, *(f"- {item}" for item in items)])
    if style == "numbers":
        return items, "\n".join([prefix, *(f"{i}. {item}" for i, item in enumerate(items, 1))])
    return items, "\n".join([prefix, *items])
