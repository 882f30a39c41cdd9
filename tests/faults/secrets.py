"""Users whose conversations hold secrets, and who notice when they are told somebody else's.

All documents and questions are worded alike, and conversations of other users have the same names,
so that state of another one answers with its secrets. Every secret is a value of its own: codes
differ from each other in at least three digits, so that a slip of the model is no other's code.
Not a test module.
"""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

Message = dict[str, str]

PLACES = "Maple House, Cedar Lodge, the blue door, the north gate, Harbour Mill, the old bridge"
PRICED = "the red lamp, the oak table, the long bench, the brass bell, the green chair, the rug"
PETS = "dog cat horse sister brother boat".split()
NUM_CODES = 4
"""Of the places; the others' codes are asked for too, and are not stated."""
MAX_TURNS = 14
REFUSALS = (400, 404, 409, 413, 422, 507)
TIMEOUT_S = 120
_VALUE = re.compile(r"\b\d{6}\b|\b[A-Z][a-z]{5}\b")


class Gone(Exception):
    """The server has ended under the request."""


class Mint:
    """Makes secrets, and knows them all. Shared by all users."""

    def __init__(self, seed: int) -> None:
        self.all: set[str] = set()
        self._random = random.Random(f"mint {seed}")
        self._lock = threading.Lock()

    def code(self) -> str:
        with self._lock:
            while True:
                made = "".join(self._random.choices("0123456789", k=6))
                codes = (other for other in self.all if other.isdigit())
                if all(sum(a != b for a, b in zip(made, c, strict=True)) > 2 for c in codes):
                    self.all.add(made)
                    return made

    def name(self) -> str:
        with self._lock:
            while True:
                pairs = zip(self._random.choices("bdfgklmnprstvz", k=3), "aoeiu", strict=False)
                made = "".join(a + self._random.choice("aeiou") for a, _ in pairs).capitalize()
                if made not in self.all:
                    self.all.add(made)
                    return made


def values(text: str) -> set[str]:
    """Return everything in a text that looks like a secret."""
    return set(_VALUE.findall(text))


@dataclass
class Tally:
    """What happened, in numbers, and everything that must not."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass
class Chat:
    """One conversation of a user, as the user has it; `names` are what was told in it last."""

    id: str
    salt: str | None
    history: list[Message]
    codes: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)

    def fork(self, new_id: str, num_messages: int) -> Chat:
        made = Chat(new_id, self.salt, self.history[:num_messages], self.codes)
        made.recall()
        return made

    def recall(self) -> None:
        """Set `names` to what the history says."""
        told = [message["content"] for message in self.history if message["role"] == "user"]
        found = (re.fullmatch(r"My (\w+) is called (\w+)\.", text) for text in told)
        self.names = {match[1]: match[2] for match in found if match}


class User:
    """A client with an API key of its own, and some conversations."""

    def __init__(self, number: int, seed: int, mint: Mint, tally: Tally) -> None:
        self.key = f"key-{number}"
        self.url = ""
        self.chats: list[Chat] = []
        self.cold_share = 0.1
        self._mint = mint
        self._tally = tally
        self._random = random.Random(f"user {number} of {seed}")
        self._made = 0

    def new_chat(self, name: str | None = None, salt: str | None = None) -> Chat:
        """Begin a conversation with a document; much of that is said to others too."""
        book = self._random.randrange(3)
        lines = [
            f"The price of {it} is {10 * book + i}." for i, it in enumerate(PRICED.split(", "))
        ]
        known = sorted(self._random.sample(PLACES.split(", "), NUM_CODES))
        codes = {place: self._mint.code() for place in known}
        lines += [f"The code of {place} is {code}." for place, code in codes.items()]
        self._made += 1
        document = {"role": "system", "content": " ".join(lines)}
        return Chat(name or f"chat-{self._made}", salt, [document], codes)

    # -- what is done -------------------------------------------------------------------------

    def act(self, client: httpx.Client) -> None:
        """Take one turn in some conversation, now and then with an order before it."""
        chat = self._random.choice(self.chats[-3:] if self._random.random() < 0.4 else self.chats)
        if len(chat.history) > 2 * MAX_TURNS:
            chat = self._replace(client, chat)
        draw = self._random.random()
        if draw < 0.07 and len(chat.history) > 2:
            chat = self._fork(client, chat)
        elif draw < 0.12 and len(chat.history) > 4:
            self._roll_back(client, chat)
        elif draw < 0.14:
            self._order(client, "save", "POST", "/save", json={"conversation": chat.id})
        elif draw < 0.15:
            chat = self._replace(client, chat)
        elif draw < 0.20 and len(chat.history) > 2:  # the last question is put in another way
            chat.history = chat.history[:-2]
            chat.recall()
        self._turn(client, chat)
        # The latest stand last.
        self.chats = [*(other for other in self.chats if other is not chat), chat]

    def _fork(self, client: httpx.Client, chat: Chat) -> Chat:
        self._made += 1
        num_messages = self._random.randrange(3, len(chat.history) + 1, 2)
        made = chat.fork(f"fork-{self._made}", num_messages)
        body = {"new_id": made.id, "at_message": num_messages - 1}
        if self._order(client, "fork", "POST", f"/{chat.id}/fork", json=body):
            self.chats.append(made)
            return made
        return chat

    def _roll_back(self, client: httpx.Client, chat: Chat) -> None:
        path, body = f"/{chat.id}/rollback", {"drop_turns": 1}
        if self._order(client, "rollback", "POST", path, json=body):
            chat.history = chat.history[:-2]
            chat.recall()

    def _replace(self, client: httpx.Client, chat: Chat) -> Chat:
        """Delete a conversation and begin another one of its name: the old is a stranger's now."""
        self._order(client, "delete", "DELETE", f"/{chat.id}")
        made = self.new_chat(chat.id, chat.salt)
        self.chats = [made if other is chat else other for other in self.chats]
        return made

    def _turn(self, client: httpx.Client, chat: Chat) -> None:
        question, expected = self._question(chat)
        asked = [*chat.history, {"role": "user", "content": question}]
        answer = self._ask(client, asked, chat.salt, {"X-Conversation-Id": chat.id})
        text = str(answer.json()["choices"][0]["message"]["content"])
        counts = self._tally.counts
        counts["turns"] += 1
        counts[f"kv {answer.headers['x-conv-kv']}"] += 1
        counts["cached tokens"] += int(answer.headers["x-conv-cached-tokens"])
        counts["prefilled tokens"] += int(answer.headers["x-conv-processing-tokens"])
        told = values(text)
        foreign = (told & self._mint.all) - values(" ".join(m["content"] for m in asked))
        if foreign:
            counts["foreign secrets"] += len(foreign)
            self._tally.faults.append(f"{self.key} {chat.id}: {question} -> {text}: {foreign}")
        counts["slips"] += len(told - self._mint.all - {"Nothing"} - values(question))
        counts["answers"] += 1
        counts["right answers"] += expected in text
        if self._random.random() < self.cold_share:
            self._compare(client, asked, text)
        chat.history = [*asked, {"role": "assistant", "content": text}]
        chat.recall()

    def _question(self, chat: Chat) -> tuple[str, str]:
        """Return what to say next, and what the reply must hold."""
        kind = self._random.choice(("code", "code", "tell", "tell", "name", "absent"))
        if kind == "name" and chat.names:
            whose = self._random.choice(sorted(chat.names))
            return f"What is my {whose} called?", chat.names[whose]
        if kind == "absent":
            absent = [place for place in PLACES.split(", ") if place not in chat.codes]
            return f"What is the code of {self._random.choice(absent)}?", "not stated"
        if kind == "tell":
            name = self._mint.name()
            return f"My {self._random.choice(PETS)} is called {name}.", name
        place = self._random.choice(sorted(chat.codes))
        return f"What is the code of {place}?", chat.codes[place]

    def _compare(self, client: httpx.Client, asked: list[Message], text: str) -> None:
        """Ask the same where nothing has been stored, and compare the replies."""
        self._made += 1
        cold = self._ask(client, asked, f"cold-{self._made}", {})
        found = str(cold.json()["choices"][0]["message"]["content"])
        self._tally.counts["cold comparisons"] += 1
        if cold.headers["x-conv-cached-tokens"] != "0" or found != text:
            self._tally.faults.append(f"{self.key}: warm {text!r}, cold {found!r}: {asked}")

    # -- HTTP ---------------------------------------------------------------------------------

    def _ask(
        self, client: httpx.Client, asked: list[Message], salt: str | None, headers: dict[str, str]
    ) -> httpx.Response:
        body: dict[str, Any] = {"messages": asked, "max_tokens": 40, "temperature": 0}
        if salt is not None:
            body["cache_salt"] = salt
        answer = self._send(client, "POST", "/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer

    def _order(self, client: httpx.Client, name: str, method: str, path: str, **how: Any) -> bool:
        answer = self._send(client, method, f"/conv_kv{path}", **how)
        done = answer.status_code == 200
        assert done or answer.status_code in REFUSALS, answer.text
        self._tally.counts[name if done else f"{name} refused"] += 1
        return done

    def _send(self, client: httpx.Client, method: str, path: str, **how: Any) -> httpx.Response:
        how["headers"] = {"Authorization": f"Bearer {self.key}", **how.get("headers", {})}
        try:
            return client.request(method, f"{self.url}/v1{path}", **how)
        except httpx.TransportError as error:
            raise Gone from error
