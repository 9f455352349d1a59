"""What a scripted provider sees of a request: one conversation, whichever of the three formats it came in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

Api = Literal["chat", "responses", "messages", "other"]


@dataclass(frozen=True)
class ToolUse:
    """A tool call that the model made earlier. `args` is None when its arguments were not a JSON object."""

    id: str
    name: str
    arguments: str

    @property
    def args(self) -> dict[str, Any] | None:
        try:
            value: Any = json.loads(self.arguments or "{}")
        except ValueError:
            return None
        return cast(dict[str, Any], value) if isinstance(value, dict) else None


@dataclass(frozen=True)
class Turn:
    """One turn. A tool's answer is a turn of role "tool" with `tool_id`."""

    role: str  # system, user, assistant, tool
    text: str = ""
    tool_calls: tuple[ToolUse, ...] = ()
    tool_id: str | None = None


@dataclass(frozen=True)
class ProviderRequest:
    """A request as a script sees it. `n` counts the provider's calls from 1; scripts that must give the same answer
    to a repeated call look at `turns` only."""

    n: int
    api: Api
    method: str
    path: str  # with query
    headers: Mapping[str, str]  # last value of each name, names in lower case
    body: bytes
    json: dict[str, Any]
    turns: tuple[Turn, ...] = field(default=())

    @property
    def model(self) -> str:
        return str(self.json.get("model") or "scripted-1")

    @property
    def stream(self) -> bool:
        return self.json.get("stream") is True

    @property
    def assistant_turns(self) -> int:
        """How often the model answered so far: the natural index into a script."""
        return sum(t.role == "assistant" for t in self.turns)

    @property
    def user_turns(self) -> int:
        return sum(t.role == "user" for t in self.turns)

    @property
    def system(self) -> str:
        return "\n".join(t.text for t in self.turns if t.role == "system")

    @property
    def first_user(self) -> str:
        """The first thing the user said: names the conversation when several share one provider."""
        return next((t.text for t in self.turns if t.role == "user"), "")

    @property
    def last_text(self) -> str:
        return self.turns[-1].text if self.turns else ""

    @property
    def tool_results(self) -> tuple[str, ...]:
        """Texts of the tool results since the model's last answer."""
        out: list[str] = []
        for turn in reversed(self.turns):
            if turn.role != "tool":
                break
            out.append(turn.text)
        return tuple(reversed(out))

    @property
    def tools(self) -> tuple[str, ...]:
        """Names of the tools that the request offers."""
        names: list[str] = []
        for tool in dicts(self.json.get("tools")):
            inner = tool.get("function")
            named = cast(dict[str, Any], inner) if isinstance(inner, dict) else tool
            names.append(str(named.get("name", "")))
        return tuple(names)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()


def api_of(path: str) -> Api:
    """Which generation endpoint `path` (no query) is."""
    if path.endswith("/chat/completions"):
        return "chat"
    if path.endswith("/responses"):
        return "responses"
    if path.endswith("/v1/messages"):
        return "messages"
    return "other"


def dicts(value: Any) -> list[dict[str, Any]]:
    """The dictionaries in a list that came from outside; an empty list when it is none."""
    if not isinstance(value, list):
        return []
    return [cast(dict[str, Any], v) for v in cast(list[Any], value) if isinstance(v, dict)]


def text_of(content: Any) -> str:
    """The text in a `content` field: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    return "".join(str(p.get("text") or p.get("refusal") or "") for p in dicts(content))


def turns_of(api: Api, body: Mapping[str, Any], earlier: Sequence[Turn] = ()) -> tuple[Turn, ...]:
    """The conversation in a request body. `earlier`: what `previous_response_id` stands for."""
    if api == "chat":
        return tuple(_chat(body))
    if api == "messages":
        return tuple(_messages(body))
    if api == "responses":
        return tuple(_responses(body, earlier))
    return ()


def _chat(body: Mapping[str, Any]) -> list[Turn]:
    out: list[Turn] = []
    for m in dicts(body.get("messages")):
        role = str(m.get("role", ""))
        calls: list[ToolUse] = []
        for call in dicts(m.get("tool_calls")):
            function = cast(dict[str, Any], call.get("function") or {})
            calls.append(ToolUse(str(call.get("id")), str(function.get("name")), str(function.get("arguments") or "")))
        tool_id = str(m["tool_call_id"]) if role == "tool" and "tool_call_id" in m else None
        role = "system" if role == "developer" else role
        out.append(Turn(role, text_of(m.get("content")), tuple(calls), tool_id))
    return out


def _messages(body: Mapping[str, Any]) -> list[Turn]:
    out: list[Turn] = []
    if body.get("system"):
        out.append(Turn("system", text_of(body["system"])))
    for m in dicts(body.get("messages")):
        role, content = str(m.get("role", "")), m.get("content")
        blocks = dicts(content)
        uses = [b for b in blocks if b.get("type") == "tool_use"]
        calls = tuple(ToolUse(str(b.get("id")), str(b.get("name")), json.dumps(b.get("input"))) for b in uses)
        results = [b for b in blocks if b.get("type") == "tool_result"]
        out.extend(Turn("tool", text_of(b.get("content")), (), str(b.get("tool_use_id"))) for b in results)
        text = text_of(content if isinstance(content, str) else [b for b in blocks if b.get("type") == "text"])
        if text or calls or not results:
            out.append(Turn(role, text, calls))
    return out


def _responses(body: Mapping[str, Any], earlier: Sequence[Turn]) -> list[Turn]:
    out = list(earlier)
    if body.get("instructions"):
        out.insert(0, Turn("system", str(body["instructions"])))
    given = body.get("input")
    if isinstance(given, str):
        out.append(Turn("user", given))
    for item in dicts(given):
        kind = item.get("type") or "message"
        if kind == "function_call_output":
            out.append(Turn("tool", text_of(item.get("output")), (), str(item.get("call_id"))))
            continue
        if kind == "function_call":
            use = ToolUse(str(item.get("call_id")), str(item.get("name")), str(item.get("arguments") or ""))
            turn = Turn("assistant", "", (use,))
        elif kind == "message":
            role = str(item.get("role", "user"))
            turn = Turn("system" if role == "developer" else role, text_of(item.get("content")))
        else:
            continue
        # One answer of the model is several items here: they are one turn, as in the other formats.
        if turn.role == "assistant" and out and out[-1].role == "assistant":
            last = out.pop()
            turn = Turn("assistant", last.text + turn.text, last.tool_calls + turn.tool_calls)
        out.append(turn)
    return out
