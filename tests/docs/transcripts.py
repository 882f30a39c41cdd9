"""Transcripts in the guide: read, sent to a server, compared, written anew. Not a test module.

A block of the language `http` is one exchange: the request line, its headers, its body; an empty
line; the status, some of the answer's headers, the answer's body. `<name` is a file as body,
`<name[:n]` its first n bytes, `>name` an answer that is kept as a file. In a body `...` stands for
what is not shown. A caller's key and the content type of JSON are added to all.

Compared are shapes and what is the same on every machine: not times, not random ids, not sizes in
bytes, of which only whether they are 0 counts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

KEY = {"Authorization": "Bearer the-guide"}
_MORE = "..."
_FILE = re.compile(r"<(?P<name>[\w.-]+)(?:\[:(?P<end>\d+)\])?")
_RANDOM_ID = re.compile(r"\b(conv_|chatcmpl-|req_|fp_)[0-9a-f]{8,}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_WIDTH = 108


@dataclass(frozen=True)
class Exchange:
    """One request and the answer that the guide shows."""

    method: str
    path: str
    headers: dict[str, str]
    body: str
    status: int
    shown_headers: dict[str, str]
    shown_body: str

    @property
    def request(self) -> str:
        lines = [f"{self.method} {self.path}", *(f"{k}: {v}" for k, v in self.headers.items())]
        return "\n".join([*lines, *([self.body] if self.body else [])])


def parse(text: str) -> Exchange:
    """Return the exchange in a block."""
    asked, _, answered = text.partition("\n\n")
    method, path = asked.splitlines()[0].split(" ")
    headers, body = _split(asked.splitlines()[1:])
    status, *rest = answered.splitlines()
    shown_headers, shown_body = _split(rest)
    return Exchange(method, path, headers, body, int(status), shown_headers, shown_body)


def send(exchange: Exchange, url: str, folder: Path) -> httpx.Response:
    """Send the request; files are read from `folder`, and kept there."""
    headers, content = {**KEY, **exchange.headers}, b""
    if file := _FILE.fullmatch(exchange.body):
        content = (folder / file["name"]).read_bytes()[: int(file["end"]) if file["end"] else None]
    elif exchange.body:
        headers.setdefault("Content-Type", "application/json")
        content = json.dumps(json.loads(exchange.body)).encode()
    answer = httpx.request(
        exchange.method, url + exchange.path, headers=headers, content=content, timeout=60
    )
    if exchange.shown_body.startswith(">") and answer.status_code == 200:
        (folder / exchange.shown_body[1:]).write_bytes(answer.content)
    return answer


def differences(exchange: Exchange, answer: httpx.Response) -> list[str]:
    """Return in what an answer is not what the guide shows, in words."""
    if answer.status_code != exchange.status:
        return [f"{answer.status_code} instead of {exchange.status}: {answer.text[:500]}"]
    found = []
    for name, shown in exchange.shown_headers.items():
        value = answer.headers.get(name)
        if value is None or _stable(name, value) != _stable(name, shown):
            found.append(f"{name}: {value} instead of {shown}")
    said = {name.lower() for name in exchange.shown_headers}
    for name in answer.headers:
        if name.lower().startswith("x-conv-") and name.lower() not in said:
            found.append(f"{name} is not shown")
    if not exchange.shown_body.startswith(">"):
        found += _compare("", read_body(exchange.shown_body), answer.json())
    return found


def answered(exchange: Exchange, answer: httpx.Response) -> str:
    """Return the block as it should stand in the guide after this answer."""
    shown = [name for name in exchange.shown_headers if name in answer.headers]
    shown += [
        name
        for name in ("X-Conv-Id", "X-Conv-KV", "X-Conv-Cached-Tokens", "X-Conv-Processing-Tokens")
        if name in answer.headers and name not in shown
    ]
    if "X-Conv-Miss-Reason" in answer.headers and "X-Conv-Miss-Reason" not in shown:
        shown.append("X-Conv-Miss-Reason")
    lines = [exchange.request, "", str(answer.status_code)]
    lines += [f"{name}: {answer.headers[name]}" for name in shown]
    if exchange.shown_body.startswith(">"):
        lines.append(exchange.shown_body)
    else:
        old = read_body(exchange.shown_body) if exchange.shown_body else None
        lines.append(layout(_shown_of(old, answer.json())))
    return "\n".join(lines)


def read_body(text: str) -> Any:
    """Return the JSON value that a transcript shows, with the key `...` where more is left out."""
    return json.loads(re.sub(r"(?<=[\[{,] )\.\.\.|(?<=[\[{])\.\.\.", '"...": null', text))


def layout(value: Any, indent: int = 0) -> str:
    """Return JSON as people lay it out: on one line while that is short."""
    flat = _flat(value)
    if len(flat) + indent <= _WIDTH or not isinstance(value, dict | list) or not value:
        return flat
    inner = " " * (indent + 1)
    if isinstance(value, list):
        parts = [layout(part, indent + 1) for part in value]
        return "[" + f",\n{inner}".join(parts) + "]"
    lines: list[str] = []
    line = ""
    for key, held in value.items():
        part = (
            _MORE if key == _MORE else f"{json.dumps(key)}: {layout(held, indent + len(key) + 5)}"
        )
        if line and len(line) + len(part) + indent + 3 > _WIDTH:
            lines.append(line)
            line = part
        else:
            line = f"{line}, {part}" if line else part
    return "{" + f",\n{inner}".join([*lines, line]) + "}"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        parts = [_MORE if k == _MORE else f"{json.dumps(k)}: {_flat(v)}" for k, v in value.items()]
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flat(part) for part in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _split(lines: list[str]) -> tuple[dict[str, str], str]:
    """Return headers, and the body behind them."""
    headers: dict[str, str] = {}
    for number, line in enumerate(lines):
        if line[:1] in "{[<>":
            return headers, "\n".join(lines[number:])
        name, _, value = line.partition(": ")
        headers[name] = value
    return headers, ""


def _shown_of(old: Any, new: Any) -> Any:
    """Return of an answer what the guide showed of it before; all of it if there was nothing."""
    if isinstance(old, dict) and isinstance(new, dict) and _MORE in old:
        return {
            key: None if key == _MORE else _shown_of(old[key], new[key])
            for key in old
            if key in new or key == _MORE
        }
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: _shown_of(old.get(key), value) for key, value in new.items()}
    if isinstance(old, list) and isinstance(new, list):
        return [_shown_of(old[min(i, len(old) - 1)] if old else None, v) for i, v in enumerate(new)]
    return new


def _compare(where: str, shown: Any, got: Any) -> list[str]:
    if isinstance(shown, dict) and isinstance(got, dict):
        names = set(shown) - {_MORE}
        found = [f"{where}.{name} is missing" for name in sorted(names - set(got))]
        if _MORE not in shown:
            found += [f"{where}.{name} is not shown" for name in sorted(set(got) - names)]
        for name in sorted(names & set(got)):
            found += _compare(f"{where}.{name}", shown[name], got[name])
        return found
    if isinstance(shown, list) and isinstance(got, list):
        if len(shown) != len(got):
            return [f"{where} has {len(got)} entries instead of {len(shown)}"]
        return [
            line
            for i, (a, b) in enumerate(zip(shown, got, strict=True))
            for line in _compare(f"{where}[{i}]", a, b)
        ]
    name = where.rpartition(".")[2]
    if _stable(name, shown) != _stable(name, got):
        return [f"{where}: {got!r} instead of {shown!r}"]
    return []


def _stable(name: str, value: Any) -> Any:
    """Return of a value what does not depend on the machine or the moment."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        unstable = name.endswith("bytes") or name in ("created", "tokens_per_second")
        return (type(value), bool(value)) if unstable else value
    if not isinstance(value, str):
        return value
    if name.lower() in ("content-length", "date"):
        return "a number"
    value = _TIME.sub("a time", _RANDOM_ID.sub(r"\1random", value))
    if name == "message":  # sizes in it
        value = re.sub(r"\d+ bytes(?: \([\d.]+ [MG]B\))?", "N bytes", value)
    return value
