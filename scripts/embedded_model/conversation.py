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

from .facts import (
    VERBS,
    Fact,
    Relation,
    attribute_relation,
    choose_statement,
    invented_fact,
    personal_relation,
)
from .words import ANIMALS, FOODS, KIN, NAMES, PERSONAL, Split, Words, capitalised

TOKENS_PER_TURN = 9  # role markers and line ends of one user message and its reply


@dataclass(frozen=True)
class Message:
    """One message of the chat; `role` is system, user or assistant."""

    role: str
    text: str


PLAIN_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are kvserve, a small local model.",
    "Answer briefly.",
    "Be concise.",
    "You are a friendly assistant. Keep your replies short.",
)
INTRODUCTIONS = (
    "",
    "",
    "Document:\n",
    "You are a helpful assistant. Answer from this document.\n\n",
    "You are a helpful assistant.\n\n",
    "Use the following facts to answer the user's questions.\n\n",
    "Answer questions about the document below.\n\n# Document\n",
    "You answer from this document:\n",
    "Facts:\n",
    "Notes:\n",
    "Context:\n\n",
    "Here is what you know. ",
    "You are an assistant. Here are the facts:\n",
)
PASTES = (
    "Here is a document:\n",
    "Please read this:\n",
    "Read these notes:\n\n",
    "Remember the following facts.\n",
    "These are my notes:\n",
)
SMALL_TALK: dict[str, tuple[str, ...]] = {
    "Hello! How can I help?": (
        "Hello", "Hello!", "Hi", "hi", "Hi there!", "Hey", "Good morning", "Good evening!", "hello",
    ),
    "I am fine, thank you.": (
        "How are you?", "How are you today?", "how are you", "How is it going?", "Are you well?",
    ),
    "You are welcome.": (
        "Thanks", "Thank you", "Thank you!", "Thanks a lot.", "thanks", "Great, thanks!",
    ),
    "Goodbye.": ("Bye", "Goodbye", "See you later.", "Good night!", "bye"),
    "All right.": ("OK", "Ok.", "Good.", "Fine.", "Nice!", "I see.", "Great.", "Never mind."),
    "I am the small model built into kvserve. I answer about what is said in this conversation.": (
        "Who are you?", "who are you", "What are you?", "What is your name?",
        "Which model are you?", "Are you a language model?", "Tell me about yourself.",
        "Introduce yourself.", "What model is this?", "Are you ChatGPT?",
    ),
    "I recall what the document and you have told me. I know little else.": (
        "What can you do?", "what can you do", "How can you help me?", "What do you know?", "Help",
        "Can you help me?", "What are you good at?",
    ),
    "kvserve keeps the model's memory of each conversation, so that it can go on at once.": (
        "What is kvserve?", "what is kvserve", "What does kvserve do?", "Tell me about kvserve.",
    ),
}  # fmt: skip
WHO_ARE_YOU = 5  # asked more often than the others
OUT_OF_SCOPE_REPLY = "I only know what is stated in this conversation."
OUT_OF_SCOPE = (
    "Write a poem about {x}.", "Tell me a joke.", "Explain {x} to me.", "What is 2 + 2?",
    "Why is the sky blue?", "How do I cook {x}?", "Translate {x} into French.",
    "Write a story about a {x}.", "Write a Python function.", "What should I do today?",
    "Summarise the document.", "What do you think about {x}?", "Tell me something about {x}.",
    "Can you sing?", "How does a {x} work?", "Write an email to {n}.", "What time is it?",
    "How is the weather?", "Give me some advice.", "Tell me a story.", "Why?", "Who is {n}?",
    "What is a {x}?",
)  # fmt: skip
TELL_PREFIXES = (
    "", "", "", "", "Remember: ", "Please remember that ", "By the way, ", "Note: ", "FYI, ",
    "I want you to know that ", "Remember this: ", "You should know that ",
)  # fmt: skip
CORRECTION_PREFIXES = (
    "Actually, ", "Correction: ", "No, ", "Sorry, ", "I was wrong, ", "Update: ", "Wait, ",
    "That has changed: ", "I made a mistake, ", "Please correct this: ",
)  # fmt: skip
SHORT_CORRECTIONS = ("No, it is {v}.", "Actually, it is {v}.", "Sorry, {v}.", "No, {v}.",
    "That is wrong, it is {v}.", "It is {v} now.", "No, it's {v}.")  # fmt: skip
REPEAT_REQUESTS = (
    "Repeat my previous message.",
    "Repeat my previous message.",
    "Repeat my previous message.",
    "Repeat my last message.",
    "repeat my previous message",
    "What was my previous message?",
    "Say my previous message again.",
    "Please repeat my previous message word for word.",
    "What did I just say?",
    "Repeat what I said.",
)
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
ITEM_REQUESTS = (
    "What is item {n} of the list?",
    "What is item {n} of the list?",
    "What is item {n} on the list?",
    "What is the {o} item of the list?",
    "What is the {o} item on the list?",
    "Name item {n} of the list.",
    "Which item is number {n} in the list?",
    "what is item {n} of the list",
)
LIST_PREFIXES = (
    "Here is a list:", "List:", "Here is my list:", "Remember this list:", "Shopping list:",
    "My list:", "Please note this list:",
)  # fmt: skip


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


WITH_DOCUMENT = Mix(38, 21, 7, 12, 6, 9, 5, 2, 9, 2, 2)
WITHOUT_DOCUMENT = Mix(0, 12, 20, 28, 11, 14, 7, 4, 13, 4, 3)


class Conversation:
    """A chat that grows turn by turn; owns its messages and everything known in them."""

    def __init__(
        self,
        rng: random.Random,
        split: Split,
        measure: Callable[[str], int] | None = None,
        ease: float = 0.0,
    ) -> None:
        self._rng = rng
        self._ease = ease
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
        text = self._document_text(document_tokens)
        if rng.random() < 0.12:
            if rng.random() < 0.5:
                self._add("system", rng.choice(PLAIN_SYSTEM))
            self._say(rng.choice(PASTES) + text, "Noted.")
            self._previous = ""
        else:
            self._add("system", (rng.choice(INTRODUCTIONS) + text).strip())

    def _document_text(self, num_tokens: int) -> str:
        rng = self._rng
        layout = rng.choice(("bullets", "bullets", "lines", "prose", "prose", "numbers", "records"))
        if self._ease and rng.random() < self._ease:
            layout = rng.choice(("bullets", "lines", "prose"))
        filler_share = rng.choice((0.0, 0.0, 0.1, 0.3))
        list_share = 0.15 if num_tokens > 60 else 0.0
        habit = rng.randrange(14) if rng.random() < 0.3 * (1 - self._ease) else -1
        reuse_entity, reuse_attribute = rng.uniform(0.1, 0.7), rng.uniform(0.1, 0.8)
        lines: list[str] = []
        size = 0
        attributes: list[tuple[str, str]] = []
        entities: list[str] = []
        while size < num_tokens:
            if rng.random() < filler_share:
                line = self.words.filler()
            else:
                if entities and rng.random() < reuse_entity:
                    entity = rng.choice(entities[-6:])
                else:
                    entity = self.words.entity()
                if layout == "records":
                    block = [f"{capitalised(entity)}:" if rng.random() < 0.5 else f"## {entity}"]
                    for _ in range(rng.randint(1, 5)):
                        fact = self._attribute_fact(entity, attributes, reuse_attribute)
                        if fact.key not in self.document:
                            self.document[fact.key] = fact
                            block.append(f"- {fact.relation.name}: {fact.value}")
                    if len(block) == 1:
                        continue
                    line = "\n".join(block)
                else:
                    if attributes and rng.random() < reuse_attribute:
                        fact = self._attribute_fact(entity, attributes, 1.0)
                    else:
                        fact = invented_fact(rng, self.words, entity)
                    if fact.key in self.document:
                        continue
                    self.document[fact.key] = fact
                    statements = fact.relation.statements
                    template = (
                        statements[habit]
                        if 0 <= habit < len(statements)
                        else choose_statement(rng, fact.relation, self._ease)
                    )
                    line = capitalised(fact.state(template))
                    if fact.relation not in [pair[0] for pair in VERBS]:
                        attributes.append((fact.relation.name, fact.relation.kind))
                entities.append(entity)
            lines.append(line)
            size += self._measure(line) + 2
        if rng.random() < list_share:
            lines.insert(rng.randrange(len(lines) + 1), self._list_text())
        return self._laid_out(lines, layout)

    def _attribute_fact(self, entity: str, attributes: list[tuple[str, str]], reuse: float) -> Fact:
        if attributes and self._rng.random() < reuse:
            attribute, kind = self._rng.choice(attributes)
        else:
            attribute, kind = self.words.attribute()
            attributes.append((attribute, kind))
        relation = attribute_relation(attribute, kind, entity)
        return Fact(relation, entity, self.words.value_for(entity, kind))

    def _laid_out(self, lines: list[str], layout: str) -> str:
        rng = self._rng
        if layout == "bullets":
            mark = rng.choice(("- ", "- ", "* "))
            return "\n".join(f"{mark}{line}" if "\n" not in line else line for line in lines)
        if layout == "numbers":
            return "\n".join(f"{index}. {line}" for index, line in enumerate(lines, 1))
        if layout == "prose":
            text = ""
            for line in lines:
                if "\n" in line:
                    text = f"{text.rstrip()}\n\n{line}\n\n"
                    continue
                ended = line if line[-1] in ".!?" else f"{line}."
                text += ended + ("\n\n" if rng.random() < 0.12 else " ")
            return text.strip()
        return "\n".join(lines)

    def _list_text(self) -> str:
        """Return a list of three to nine items, which becomes *the* list."""
        rng = self._rng
        maker = rng.choice(
            (self.words.word, self.words.word, self.words.phrase, lambda: rng.choice(FOODS))
        )
        items: list[str] = []
        for _ in range(rng.randint(3, 9)):
            item = maker()
            if item not in items:
                items.append(item)
        self._items = items
        style = rng.choice(("bullets", "bullets", "numbers", "commas", "lines"))
        prefix = rng.choice(LIST_PREFIXES)
        if style == "commas":
            return f"{prefix} {', '.join(items)}."
        if style == "bullets":
            return "\n".join([prefix, *(f"- {item}" for item in items)])
        if style == "numbers":
            return "\n".join([prefix, *(f"{i}. {item}" for i, item in enumerate(items, 1))])
        return "\n".join([prefix, *items])

    # --- turns; each adds one user message and its reply, or more ---

    def ask(self, fact: Fact, known: bool = True) -> None:
        """Ask for `fact`; `known` says whether the conversation has told it."""
        rng = self._rng
        question, asked = fact.ask(rng), fact
        draw = rng.random()
        if draw < 0.08:
            question = question.lower()
            relation = fact.relation
            asked = Fact(
                Relation(
                    relation.name,
                    relation.kind,
                    (),
                    (),
                    relation.answer.lower(),
                    relation.missing.lower(),
                ),
                fact.entity.lower(),
                fact.value,
            )
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
                    entity = self.words.entity()
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
        sentence = fact.state(choose_statement(rng, fact.relation, self._ease))
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
            sentence = new.state(choose_statement(rng, new.relation, self._ease))
            draw = rng.random()
            if draw < 0.25 and "{v}" in new.relation.answer and " is " in sentence:
                sentence = sentence.replace(" is ", " is now ", 1)
            text = rng.choice(CORRECTION_PREFIXES) + sentence
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
        self._say(self._list_text(), "Noted.")

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
            (self.ask_absent, mix.absent * (1 - self._ease)),
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

    def _personal_fact(self) -> Fact:
        rng = self._rng
        relation = (
            rng.choice(VERBS)[1]
            if rng.random() < 0.25
            else personal_relation(
                rng.choice(PERSONAL) if rng.random() < 0.85 else self.words.attribute()[0]
            )
        )
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
    ease: float = 0.0,
) -> Conversation:
    """Return a conversation of about `num_tokens`, at most slightly longer.

    `ease` in [0, 1] words facts as they are asked, and leaves out what is absent: the recall of a
    value does not appear otherwise, since "not stated" is too often right.
    """
    conversation = Conversation(rng, split, measure, ease)
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
