"""How one fact is stated, asked, answered, and answered when it is missing.

Every answer repeats what was asked and comes to the value last ("The code of the door is ..."). So
whether a fact is absent is decided where its value would stand. Answers follow the wording of
the question, never that of the document: a missing fact has no wording in the document.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .words import Words, capitalised

ME = "me"


@dataclass(frozen=True)
class Relation:
    """The sentences of one kind of fact; `{e}` stands for the entity, `{v}` for the value.

    Sentences begin in lower case where their first word allows it; callers capitalise.
    """

    name: str
    kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    missing: str


@dataclass(frozen=True)
class Fact:
    """A value that an entity has. Two facts contradict each other if their `key` is the same."""

    relation: Relation
    entity: str
    value: str

    @property
    def key(self) -> tuple[str, str]:
        """What the fact is about, regardless of letter case."""
        return self.relation.name, self.entity.lower()

    def with_value(self, value: str) -> Fact:
        """Return the same fact with another value."""
        return replace(self, value=value)

    def lowered(self) -> Fact:
        """Return the fact as a question in lower case asks for it; the value keeps its case."""
        answer, missing = self.relation.answer.lower(), self.relation.missing.lower()
        relation = replace(self.relation, answer=answer, missing=missing)
        return replace(self, relation=relation, entity=self.entity.lower())

    def state(self, template: str) -> str:
        """Return the sentence that tells the fact."""
        return _filled(template, self.entity, self.value)

    def ask(self, rng: random.Random) -> str:
        """Return a question for the fact, in one of many phrasings."""
        return _filled(rng.choice(self.relation.questions), self.entity, "")

    def answer(self) -> str:
        """Return the answer to the question, without capital."""
        return _filled(self.relation.answer, _seen_by_model(self.entity), self.value)

    def missing(self) -> str:
        """Return the answer to the same question when the fact is not known."""
        return _filled(self.relation.missing, _seen_by_model(self.entity), "")


def _filled(template: str, entity: str, value: str) -> str:
    text = template.replace("{E}", capitalised(entity)).replace("{e}", entity)
    return text.replace("{V}", capitalised(value)).replace("{v}", value)


def _seen_by_model(entity: str) -> str:
    """Return the entity as the model names it: the user's "my sister" is "your sister"."""
    return f"your {entity[3:]}" if entity.startswith("my ") else entity


# The first statements are the commonest: `choose_statement` prefers them. Left out, because four
# layers did not learn them: a value before its attribute ("{e} uses {v} as its {a}."), and nothing
# between attribute and value ("{e}: {a} {v}").
_STATEMENTS = (
    "the {a} of {e} is {v}.",
    "{e}'s {a} is {v}.",
    "the {a} for {e} is {v}.",
    "{e} has the {a} {v}.",
    "for {e}, the {a} is {v}.",
    "{a} of {e}: {v}",
    "{e} - {a}: {v}",
    "{e}: {a} = {v}",
    "note that the {a} of {e} is {v}.",
    "the {a} of {e} was set to {v}.",
    "as for {e}, its {a} is {v}.",
)
_COMPOUND_STATEMENT = "the {bare} {a} is {v}."
_QUESTIONS = (
    "What is the {a} of {e}?",
    "What is the {a} of {e}?",
    "What is the {a} of {e}?",
    "What is {e}'s {a}?",
    "What's the {a} of {e}?",
    "What's {e}'s {a}?",
    "Tell me the {a} of {e}.",
    "What is the {a} for {e}?",
    "Do you know the {a} of {e}?",
    "Which {a} does {e} have?",
    "And the {a} of {e}?",
    "{E}: what is the {a}?",
    "Please tell me {e}'s {a}.",
    "I need the {a} of {e}.",
    "Can you tell me what the {a} of {e} is?",
    "Give me the {a} of {e}",
    "According to the document, what is the {a} of {e}?",
)
_COMPOUND_QUESTION = "What is the {bare} {a}?"


def attribute_relation(attribute: str, kind: str, entity: str) -> Relation:
    """Return the relation "the attribute of the entity is the value"."""
    bare = entity.removeprefix("the ")
    statements = [text.replace("{a}", attribute) for text in _STATEMENTS]
    questions = [text.replace("{a}", attribute) for text in _QUESTIONS]
    if " in " not in bare and not entity.startswith("my "):
        compound = _COMPOUND_STATEMENT.replace("{a}", attribute).replace("{bare}", bare)
        statements.append(compound)
        questions.append(_COMPOUND_QUESTION.replace("{a}", attribute).replace("{bare}", bare))
    if kind == "person":
        questions += [f"Who is the {attribute} of {{e}}?", f"Who is {{e}}'s {attribute}?"] * 2
    if attribute == "name":
        statements += ["{e} is called {v}."] * 3
        questions += ["What is {e} called?", "What is {e} called?", "What is the name of {e}?"]
    return Relation(
        name=attribute.lower(),
        kind=kind,
        statements=tuple(statements),
        questions=tuple(questions),
        answer=f"the {attribute} of {{e}} is {{v}}.",
        missing=f"the {attribute} of {{e}} is not stated.",
    )


def personal_relation(attribute: str) -> Relation:
    """Return the relation "the user's own attribute is the value"."""
    kinds = {"name": "person", "nickname": "person", "age": "number", "home town": "place"}
    extra_statements: tuple[str, ...] = ()
    extra_questions: tuple[str, ...] = ()
    if attribute == "name":
        extra_statements = ("my name is {v}.", "I am called {v}.", "call me {v}.", "I am {v}.")
        extra_questions = ("What am I called?", "Do you remember my name?", "Who am I?")
    return Relation(
        name=attribute.lower(),
        kind=kinds.get(attribute, "any"),
        statements=(
            f"my {attribute} is {{v}}.",
            f"my {attribute} is {{v}}",
            *extra_statements,
        ),
        questions=(
            f"What is my {attribute}?",
            f"What is my {attribute}?",
            f"What's my {attribute}?",
            f"Do you know my {attribute}?",
            f"What did I say my {attribute} was?",
            f"Tell me my {attribute}.",
            f"Do you remember what my {attribute} is?",
            *extra_questions,
        ),
        answer=f"your {attribute} is {{v}}.",
        missing=f"your {attribute} is not stated.",
    )


def _verb(
    name: str, kind: str, verb: tuple[str, str], question: str, missing: str
) -> tuple[Relation, Relation]:
    """Return a relation told by a verb, for a third person and for the user.

    `verb` holds the third person's form and the plain form; `question` has `{do}` and `{base}`.
    """
    third, base = verb
    other = Relation(
        name=name,
        kind=kind,
        statements=(f"{{e}} {third} {{v}}.",),
        questions=(question.format(do="does {e}"), f"Tell me: {question.format(do='does {e}')}"),
        answer=f"{{e}} {third} {{v}}.",
        missing=f"{{e}} {third} {missing}.",
    )
    mine = Relation(
        name=name,
        kind=kind,
        statements=(f"I {base} {{v}}.",),
        questions=(question.format(do="do I"), f"Tell me, {question.format(do='do I')}"),
        answer=f"you {base} {{v}}.",
        missing=f"you {base} {missing}.",
    )
    return other, mine


_PLACE = "a place that is not stated"
_THING = "something that is not stated"
VERBS = (
    _verb("lives in", "place", ("lives in", "live in"), "Where {do} live?", _PLACE),
    _verb(
        "works as a",
        "job",
        ("works as a", "work as a"),
        "What {do} work as?",
        "job that is not stated",
    ),
    _verb("works in", "place", ("works in", "work in"), "Where {do} work?", _PLACE),
    _verb("likes", "food", ("likes", "like"), "What {do} like?", _THING),
    _verb("speaks", "language", ("speaks", "speak"), "What language {do} speak?", _THING),
    _verb("comes from", "place", ("comes from", "come from"), "Where {do} come from?", _PLACE),
    _verb("plays", "other", ("plays", "play"), "What {do} play?", _THING),
    _verb("collects", "food", ("collects", "collect"), "What {do} collect?", _THING),
    _verb("drives", "other", ("drives", "drive"), "What {do} drive?", _THING),
)


def choose_statement(rng: random.Random, relation: Relation, ease: float = 0.0) -> str:
    """Return one of the relation's statements, the commonest ones more often.

    `ease` is the share of statements that are worded like the answer.
    """
    if ease and rng.random() < ease:
        return relation.statements[0]
    if rng.random() < 0.45:
        return relation.statements[min(rng.randrange(2), len(relation.statements) - 1)]
    return rng.choice(relation.statements)


def invented_fact(rng: random.Random, words: Words, entity: str) -> Fact:
    """Return a new fact about `entity`."""
    is_person = entity[:1].isupper() and " " not in entity
    if is_person and rng.random() < 0.35:
        relation = rng.choice(VERBS)[0]
    else:
        attribute, kind = words.attribute()
        relation = attribute_relation(attribute, kind, entity)
    return Fact(relation, entity, words.value_for(entity, relation.kind))
