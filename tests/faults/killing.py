"""Clients that work on a server while it is killed, and know what it must still know afterwards.

Each actor owns its conversations, so that what was acknowledged to it is all there is to know of
them. An operation that was under way when the server died may have happened or not; everything
that was answered must have. Not a test module.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.tiny_models import words

Message = dict[str, str]
DOCUMENT: Message = {"role": "system", "content": words(160, seed=77)}
TIMEOUT_S = 60
REPLY_TOKENS = 8


def refused(response: httpx.Response) -> bool:
    """Whether an order was refused for lack of room, in memory or on disk.

    A turn that memory could not keep is recorded as far as it was: behind that there is no cut.
    """
    if response.status_code == 400:
        return bool(response.json()["error"]["code"] == "no_cut")
    return response.status_code in (409, 413, 507)


class Gone(Exception):
    """The server was killed under the request."""


@dataclass
class Known:
    """What an actor knows of one conversation.

    `history` is what the client has seen; a turn sends it whole. `lengths` are the numbers of
    messages that the stored conversation may have, `floor` the tokens of it that must be held
    on disk (0: no promise). `gone` and `here` say whether it may be unknown, and may be known.
    """

    id: str
    history: list[Message]
    lengths: set[int] = field(default_factory=set)
    floor: int = 0
    gone: bool = True
    here: bool = True
    saved: bool = False


@dataclass
class Tally:
    """What was tried and found over all rounds."""

    kills: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    interrupted: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    checked_conversations: int = 0
    checked_replies: int = 0
    ties: int = 0
    reused_tokens: int = 0
    faults: list[str] = field(default_factory=list)


class Actor:
    """One client with conversations of its own. `url` changes with each server.

    `is_tie` says of a prompt whether its greedy reply hangs on less than rounding gives: a random
    model has such ones, and there a warm and a cold run may both be right.
    """

    def __init__(
        self, number: int, seed: int, tally: Tally, is_tie: Callable[[list[Message]], bool]
    ) -> None:
        self._is_tie = is_tie
        self._number = number
        self._choose = random.Random(f"{seed}-{number}")
        self._tally = tally
        self._made = 0
        self.known: dict[str, Known] = {}
        self.url = ""

    # -- working ------------------------------------------------------------------------------

    def work(self, stop: threading.Event) -> None:
        """Do one thing after the other until told to stop or the server is gone."""
        with httpx.Client(timeout=TIMEOUT_S) as client:
            try:
                while not stop.is_set():
                    self._one(client)
            except Gone:
                return
            except Exception as error:  # a thread's error would else be lost
                self._tally.faults.append(f"actor {self._number}: {error!r}")

    def _one(self, client: httpx.Client) -> None:
        alive = [known for known in self.known.values() if not known.gone]
        choices: list[tuple[Callable[..., None], int]] = [(self._turn, 6)]
        if alive:
            choices += [(self._save, 3), (self._fork, 2), (self._rollback, 2), (self._delete, 1)]
        names, weights = zip(*choices, strict=True)
        (operation,) = self._choose.choices(names, weights)
        name = operation.__name__.strip("_")
        self._tally.operations[name] = self._tally.operations.get(name, 0) + 1
        if operation == self._turn:
            self._turn(client)
            return
        operation(client, self._choose.choice(alive))

    def _call(self, client: httpx.Client, what: str, **how: Any) -> httpx.Response:
        method, path = what.split(" ")
        try:
            return client.request(method, f"{self.url}{path}", **how)
        except httpx.TransportError as error:
            name = path.rpartition("/")[2] if path.startswith("/v1/conv_kv") else "turn"
            name = "delete" if method == "DELETE" else name
            self._tally.interrupted[name] = self._tally.interrupted.get(name, 0) + 1
            raise Gone from error

    def _turn(self, client: httpx.Client) -> None:
        alive = [known for known in self.known.values() if not known.gone]
        if not alive or (len(alive) < 6 and self._choose.random() < 0.4):
            known = Known(self._new_id(), [DOCUMENT])
            self.known[known.id] = known
        else:
            known = self._choose.choice(alive)
        self._made += 1
        text = words(self._choose.randrange(3, 60), seed=1000 * self._number + self._made)
        asked = [*known.history, {"role": "user", "content": text}]
        known.lengths |= {len(asked), len(asked) + 1}
        reply = self.ask(client, asked, known.id)
        known.history = [*asked, {"role": "assistant", "content": reply}]
        known.here = True
        known.lengths.add(len(known.history))
        known.gone = False  # it is known to the running server; written within a second

    def ask(self, client: httpx.Client, messages: list[Message], conversation: str) -> str:
        body = {"messages": messages, "max_tokens": REPLY_TOKENS, "temperature": 0}
        how: dict[str, Any] = {"json": body, "headers": {"X-Conversation-Id": conversation}}
        response = self._call(client, "POST /v1/chat/completions", **how)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def _save(self, client: httpx.Client, known: Known) -> None:
        response = self._call(
            client, "POST /v1/conv_kv/save", json={"conversation_id": known.id, "title": "kept"}
        )
        if refused(response):
            self._tally.refused += 1
            return
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["messages"] == len(known.history), (answer, len(known.history))
        known.saved, known.lengths = True, {len(known.history)}
        known.floor = answer["tokens"]

    def _fork(self, client: httpx.Client, known: Known) -> None:
        new = Known(self._new_id(), list(known.history), lengths={len(known.history)})
        self.known[new.id] = new
        response = self._call(client, f"POST /v1/conv_kv/{known.id}/fork", json={"new_id": new.id})
        if refused(response):
            self._tally.refused += 1
            new.here = False
            return
        assert response.status_code == 200, response.text
        new.gone = False
        new.floor = -1  # it must be there; how much of its state is, eviction decides

    def _rollback(self, client: httpx.Client, known: Known) -> None:
        if len(known.history) < 5:
            return
        shorter = known.history[:-2]
        known.lengths.add(len(shorter))
        response = self._call(
            client, f"POST /v1/conv_kv/{known.id}/rollback", json={"drop_turns": 1}
        )
        if refused(response):
            self._tally.refused += 1
            return
        assert response.status_code == 200, response.text
        known.history, known.lengths = shorter, {len(shorter)}
        known.floor = -1 if known.floor else 0

    def _delete(self, client: httpx.Client, known: Known) -> None:
        known.gone = True  # from now on it may be
        response = self._call(client, f"DELETE /v1/conv_kv/{known.id}")
        assert response.status_code == 200, response.text
        known.here = False

    def _new_id(self) -> str:
        self._made += 1
        return f"actor-{self._number}-{self._made}"

    # -- looking back -------------------------------------------------------------------------

    def check(self, client: httpx.Client) -> None:
        """Compare a fresh server with what was acknowledged, and go on from what it has."""
        for known in list(self.known.values()):
            self._tally.checked_conversations += 1
            response = self._call(client, f"GET /v1/conv_kv/{known.id}")
            if response.status_code == 404:
                if known.floor and not known.gone:
                    self._fault(known, "acknowledged as durable, but unknown after the kill")
                del self.known[known.id]
                continue
            assert response.status_code == 200, response.text
            found = response.json()
            if not known.here:
                self._fault(known, "deleted, but there after the kill")
            if found["messages"] not in known.lengths:
                self._fault(known, f"{found['messages']} messages, not {sorted(known.lengths)}")
            if known.saved and not found["saved"]:
                self._fault(known, "saved, but not so after the kill")
            # What came after the save may have been refused for lack of room, or evicted.
            of_save = [cut for cut in found["cuts"] if cut["end"] <= known.floor]
            if any(cut["tier"] == "none" for cut in of_save):
                self._fault(known, "a part of what was saved is not held")
            self._adopt(known, found["messages"])

    def _adopt(self, known: Known, num_messages: int) -> None:
        """Take the server's word where an operation was under way."""
        if num_messages < len(known.history):
            known.history = known.history[:num_messages]
        known.gone, known.here = False, True
        known.lengths = {num_messages, len(known.history)}
        if not known.saved:
            known.floor = 0

    def check_reply(self, client: httpx.Client) -> None:
        """Ask a conversation on, and compare its reply with the one of a cold run."""
        alive = [known for known in self.known.values() if not known.gone]
        if not alive:
            return
        known = self._choose.choice(alive)
        self._made += 1
        question: Message = {"role": "user", "content": words(9, seed=self._made)}
        asked = [*known.history, question]
        warm_body = {"messages": asked, "max_tokens": REPLY_TOKENS, "temperature": 0}
        warm = self._call(
            client,
            "POST /v1/chat/completions",
            json=warm_body,
            headers={"X-Conversation-Id": known.id},
        )
        salt = f"cold-{self._number}-{self._made}"
        cold = self._call(
            client, "POST /v1/chat/completions", json={**warm_body, "cache_salt": salt}
        )
        assert warm.status_code == cold.status_code == 200, (warm.text, cold.text)
        texts = [r.json()["choices"][0]["message"]["content"] for r in (warm, cold)]
        assert cold.headers["x-conv-cached-tokens"] == "0"
        if texts[0] != texts[1]:
            self._tally.ties += 1
            if not self._is_tie(asked):
                self._fault(known, f"a wrong reply: {texts}")
        reused = int(warm.headers["x-conv-cached-tokens"])
        if known.floor > 0 and known.saved and reused == 0:
            self._fault(known, "saved, but nothing of it was reused")
        self._tally.checked_replies += 1
        self._tally.reused_tokens += reused
        known.history = [*asked, {"role": "assistant", "content": texts[0]}]
        known.lengths |= {len(asked), len(known.history)}

    def _fault(self, known: Known, what: str) -> None:
        self._tally.faults.append(f"kill {self._tally.kills}: {known.id}: {what}")
