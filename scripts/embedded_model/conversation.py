"""Whole conversations: a system prompt, then turns in which everything said can be checked.

A conversation keeps what is known so far (the document's facts, the user's facts, corrections, the
latest list, the previous message), so each reply follows from the text before it and from nothing
else. `Conversation` owns that state and draws from the random generator given to it; the same seed
gives the same text. Sizes are measured in tokens by the `measure` function of the caller.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .document import Difficulty, Document, draw_list
from .facts import (
    VERBS,
    Fact,
    attribute_relation,
    choose_statement,
    invented_fact,
    personal_relation,
)
from .phrases import (
    CORRECTION_PREFIXES,
    INTRODUCTIONS,
    ITEM_REQUESTS,
    ORDINALS,
    OUT_OF_SCOPE,
    OUT_OF_SCOPE_REPLY,
    PASTES,
    PLAIN_SYSTEM,
    REPEAT_REQUESTS,
    SHORT_CORRECTIONS,
    SMALL_TALK,
    TELL_PREFIXES,
    WHO_ARE_YOU,
)
from .words import ANIMALS, FOODS, KIN, NAMES, PERSONAL, Split, Words, capitalised

MEASURED = Difficulty()
TOKENS_PER_TURN = 9  # role markers and line ends of one user message and its reply


@dataclass(frozen=True)
class Message:
    """One message of the chat; `role` is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class Mix:
    """How often each kind of turn is drawn, relative to the others."""

    document: float
    absent: float
    tell: float
    told: float
    correct: float
    repeat: float
    message: float
    make_list: float
    item: float
    small_talk: float
    out_of_scope: float


WITH_DOCUMENT = Mix(38, 40, 7, 12, 12, 6, 4, 4, 20, 2, 2)
WITHOUT_DOCUMENT = Mix(0, 22, 20, 26, 20, 8, 4, 7, 28, 4, 3)


class Conversation:
    """A chat that grows turn by turn; owns its messages and everything known in them."""

    def __init__(
        self,
        rng: random.Random,
        split: Split,
        measure: Callable[[str], int] | None = None,
        difficulty: Difficulty = MEASURED,
    ) -> None:
        self._rng = rng
        self._difficulty = difficulty
        self.words = Words(rng, split)
        self._measure = measure or (lambda text: len(text) // 3)
        self.messages: list[Message] = []
        self.num_tokens = 0
        self.document: dict[tuple[str, str], Fact] = {}
        self.told: dict[tuple[str, str], Fact] = {}
        self.corrected: set[tuple[str, str]] = set()
        self._latest: Fact | None = None  # what "No, it is ..." would correct
        self._items: list[str] = []
        self._previous = ""  # the user's previous message

    # --- the opening ---

    def open(self, document_tokens: int) -> None:
        """Begin with a document of about so many tokens; 0 means without one."""
        rng = self._rng
        if document_tokens <= 0:
            draw = rng.random()
            if draw < 0.5:
                self._add("system", rng.choice(PLAIN_SYSTEM))
            return
        document = Document(rng, self.words, self._measure, document_tokens, self._difficulty)
        self.document, text = document.facts, document.text
        self._items = document.items
        if rng.random() < 0.12:
            if rng.random() < 0.5:
                self._add("system", rng.choice(PLAIN_SYSTEM))
            self._say(rng.choice(PASTES) + text, "Noted.")
            self._previous = ""
        else:
            self._add("system", (rng.choice(INTRODUCTIONS) + text).strip())

    # --- turns; each adds one user message and its reply, or more ---

    def ask(self, fact: Fact, known: bool = True) -> None:
        """Ask for `fact`; `known` says whether the conversation has told it."""
        rng = self._rng
        question, asked = fact.ask(rng), fact
        draw = rng.random()
        if draw < 0.08:
            question, asked = question.lower(), fact.lowered()
            if rng.random() < 0.5:
                question = question.rstrip("?.")
        elif draw < 0.11:
            question = question.rstrip("?.")
        elif draw < 0.14:
            question = rng.choice(("Hello. ", "Now, ", "Please: ", "Thanks. ", "OK. ")) + question
        answer = asked.answer() if known else asked.missing()
        self._say(capitalised(question), capitalised(answer))
        self._latest = fact if known else None

    def ask_document(self) -> None:
        """Ask for a fact of the document."""
        self.ask(self._rng.choice(list(self.document.values())))

    def ask_told(self) -> None:
        """Ask for a fact that the user told, in its latest version."""
        corrected = [fact for key, fact in self.told.items() if key in self.corrected]
        if corrected and self._rng.random() < 0.4:
            self.ask(self._rng.choice(corrected))
        else:
            self.ask(self._rng.choice(list(self.told.values())))

    def ask_absent(self) -> None:
        """Ask for a fact that nobody has told, preferably close to one that was."""
        rng = self._rng
        facts = [*self.document.values(), *self.told.values()]
        while True:
            draw = rng.random()
            if facts and draw < 0.5:
                one, two = rng.choice(facts), rng.choice(facts)
                if one.entity == "me" or two.entity == "me":
                    fact = self._personal_fact()
                elif (one.relation.name, two.entity.lower()) in self.document or any(
                    one.relation in pair for pair in VERBS
                ):
                    continue
                else:
                    relation = attribute_relation(one.relation.name, one.relation.kind, two.entity)
                    fact = Fact(relation, two.entity, "")
            elif facts and draw < 0.65:
                near = rng.choice(facts)
                if near.entity == "me":
                    fact = self._personal_fact()
                else:
                    fact = invented_fact(rng, self.words, near.entity)
            elif facts and draw < 0.85:
                near = rng.choice(facts)
                if near.entity == "me":
                    fact = self._personal_fact()
                elif any(near.relation in pair for pair in VERBS):
                    continue
                else:
                    entity = self._other_entity(near.entity)
                    fact = Fact(
                        attribute_relation(near.relation.name, near.relation.kind, entity),
                        entity,
                        "",
                    )
            elif draw < 0.92 or not self.document:
                fact = self._user_fact()
            else:
                fact = invented_fact(rng, self.words, self.words.entity())
            if fact.key not in self.document and fact.key not in self.told:
                break
        self.ask(fact, known=False)

    def tell(self) -> None:
        """Let the user tell a new fact."""
        while True:
            fact = self._user_fact()
            if fact.key not in self.document and fact.key not in self.told:
                break
        self.tell_fact(fact)

    def tell_fact(self, fact: Fact) -> None:
        """Let the user tell `fact`."""
        rng = self._rng
        sentence = fact.state(choose_statement(rng, fact.relation, self._difficulty.ease))
        prefix = rng.choice(TELL_PREFIXES)
        if not prefix or (prefix[-2] in ":," and rng.random() < 0.4):
            sentence = capitalised(sentence)
        if rng.random() < 0.08:
            sentence = sentence.rstrip(".")
        self.told[fact.key] = fact
        self._latest = fact
        if fact.relation.name == "name" and fact.entity == "me" and not prefix:
            reply = f"Nice to meet you, {fact.value}."
        else:
            reply = f"Noted, {fact.answer()}"
        self._say(prefix + sentence, reply)

    def correct(self) -> None:
        """Let the user correct a told fact, seldom one of the document."""
        rng = self._rng
        if self.document and (not self.told or rng.random() < 0.3):
            old = rng.choice(list(self.document.values()))
        else:
            old = rng.choice(list(self.told.values()))
        if self._latest is not None and rng.random() < 0.4:
            old = self._latest
        self.correct_fact(old)

    def correct_fact(self, old: Fact) -> Fact:
        """Let the user give `old` another value; returns the corrected fact."""
        rng = self._rng
        new = old.with_value(self.words.value_for(old.entity, old.relation.kind, old.value))
        if self._latest is not None and self._latest.key == old.key and rng.random() < 0.6:
            text = rng.choice(SHORT_CORRECTIONS).replace("{v}", new.value)
        else:
            sentence = new.state(choose_statement(rng, new.relation, self._difficulty.ease))
            prefix = "" if rng.random() < 0.25 else rng.choice(CORRECTION_PREFIXES)
            if rng.random() < (0.25 if prefix else 0.8):
                sentence = sentence.replace(" is ", " is now ", 1)
            text = prefix + sentence if prefix else capitalised(sentence)
        if old.key in self.document:
            self.document[old.key] = new
        else:
            self.told[old.key] = new
        self.corrected.add(old.key)
        self._latest = new
        self._say(text, f"Corrected, {new.answer()}")
        return new

    def say_message(self) -> None:
        """Let the user say something meaningless, which is only worth repeating."""
        filler = self._rng.random() < 0.3
        self._say(self.words.filler() if filler else self.words.message(), "I see.")

    def repeat(self) -> None:
        """Ask for the user's previous message, word for word."""
        if not self._previous or "\n" in self._previous or self._measure(self._previous) > 40:
            self.say_message()
        self._say(self._rng.choice(REPEAT_REQUESTS), self._previous)

    def give_list(self) -> None:
        """Let the user give a list, which replaces any earlier one."""
        self._items, text = draw_list(self._rng, self.words)
        self._say(text, "Noted.")

    def ask_item(self) -> None:
        """Ask for an item of the list by its number; seldom for its neighbour, or for too much."""
        rng = self._rng
        if not self._items:
            self.give_list()
        items = self._items
        draw = rng.random()
        if draw < 0.12 and len(items) > 1:
            index = rng.randrange(len(items) - 1)
            self._say(
                f"What comes after {items[index]} in the list?",
                f"After {items[index]} comes {items[index + 1]}.",
            )
            return
        if draw < 0.17:
            self._say("What is the last item of the list?", f"The last item is {items[-1]}.")
            return
        self.ask_listed_item(rng.randrange(10) if draw < 0.27 else None)

    def ask_listed_item(self, index: int | None = None) -> None:
        """Ask for the item at `index` of the list, which may have fewer; by default for any."""
        rng, items = self._rng, self._items
        if index is None:
            index = rng.randrange(len(items))
        request = rng.choice(ITEM_REQUESTS).replace("{o}", ORDINALS[index])
        found = f"is {items[index]}" if index < len(items) else "is not stated"
        self._say(request.replace("{n}", str(index + 1)), f"Item {index + 1} of the list {found}.")

    def small_talk(self) -> None:
        """Greet, thank, or ask who is there."""
        rng = self._rng
        replies = list(SMALL_TALK)
        reply = replies[WHO_ARE_YOU] if rng.random() < 0.35 else rng.choice(replies)
        self._say(rng.choice(SMALL_TALK[reply]), reply)

    def out_of_scope(self) -> None:
        """Ask for what a model of this size cannot do."""
        rng = self._rng
        request = rng.choice(OUT_OF_SCOPE).replace("{n}", rng.choice(NAMES))
        word = rng.choice((rng.choice(FOODS), rng.choice(ANIMALS), self.words.word()))
        self._say(request.replace("{x}", word), OUT_OF_SCOPE_REPLY)

    def turn(self, mix: Mix) -> None:
        """Add one turn of a kind drawn from `mix`."""
        kinds: list[tuple[Callable[[], None], float]] = [
            (self.ask_document, mix.document if self.document else 0),
            (self.ask_absent, mix.absent * (1 - self._difficulty.ease)),
            (self.tell, mix.tell),
            (self.ask_told, mix.told if self.told else 0),
            (self.correct, mix.correct if self.told else 0),
            (self.repeat, mix.repeat),
            (self.say_message, mix.message),
            (self.give_list, mix.make_list),
            (self.ask_item, mix.item),
            (self.small_talk, mix.small_talk),
            (self.out_of_scope, mix.out_of_scope),
        ]
        weights = [weight for _, weight in kinds]
        self._rng.choices([kind for kind, _ in kinds], weights)[0]()

    # --- facts of the user, and the text itself ---

    def _other_entity(self, entity: str) -> str:
        if self._difficulty.siblings and self._rng.random() < 0.5:
            return self.words.sibling(entity)
        return self.words.entity()

    def _personal_fact(self) -> Fact:
        rng = self._rng
        draw = rng.random()
        if draw < 0.25:
            relation = rng.choice(VERBS)[1]
        elif draw < 0.36:
            relation = personal_relation("name")
        elif draw < 0.89:
            relation = personal_relation(rng.choice(PERSONAL))
        else:
            relation = personal_relation(self.words.attribute()[0])
        return Fact(relation, "me", self.words.value_for("me", relation.kind))

    def _user_fact(self) -> Fact:
        rng = self._rng
        draw = rng.random()
        if draw < 0.45:
            return self._personal_fact()
        if draw < 0.65:
            entity = f"my {rng.choice(KIN)}"
            attribute = "name" if rng.random() < 0.5 else self.words.attribute()[0]
            relation = attribute_relation(
                attribute, "person" if attribute == "name" else "any", entity
            )
            return Fact(relation, entity, self.words.value_for(entity, relation.kind))
        return invented_fact(rng, self.words, self.words.entity())

    def _say(self, text: str, reply: str) -> None:
        self._add("user", text)
        self._add("assistant", reply)
        self._previous = text
        self.num_tokens += TOKENS_PER_TURN

    def _add(self, role: str, text: str) -> None:
        self.messages.append(Message(role, text))
        self.num_tokens += self._measure(text)


def draw_conversation(
    rng: random.Random,
    split: Split,
    num_tokens: int,
    measure: Callable[[str], int] | None = None,
    difficulty: Difficulty = MEASURED,
) -> Conversation:
    """Return a conversation of about `num_tokens`, at most slightly longer."""
    conversation = Conversation(rng, split, measure, difficulty)
    draw = rng.random()
    if draw < 0.16:
        share = 0.0
    elif draw < 0.6:
        share = rng.uniform(0.6, 0.88)
    else:
        share = rng.uniform(0.1, 0.75)
    conversation.open(int(share * num_tokens))
    mix = WITH_DOCUMENT if conversation.document else WITHOUT_DOCUMENT
    while conversation.num_tokens < num_tokens:
        conversation.turn(mix)
    return conversation
