"""A recorded model call as a conversation: what its request said so far, and what the model answered. Pure functions.

`read` gives the conversation in the call's own form (`Conversation.messages`), with every field that the agent sent;
`turns` what all forms have in common, for writing it in another one (`rethaw.gateway.messages`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

Api = Literal["chat", "responses", "messages"]
Dict = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A piece of content: text, or an image by its `url` (also a data: URL). What no other form knows is a text that names
    it."""

    text: str = ""
    url: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Turn:
    """`role`: system, user, assistant, or tool: what the tool call `answers` brought."""

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    answers: str = ""
    failed: bool = False

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Conversation:
    """In the form of `api`. `system`: of the forms that keep it apart from the messages. `previous`: id of the answer that
    it goes on from (Responses), whose conversation comes before these messages. `answer`: id of its own answer."""

    api: Api
    messages: tuple[Dict, ...]
    system: str = ""
    previous: str | None = None
    answer: str | None = None

    def after(self, earlier: Conversation) -> Conversation:
        """With what came before it."""
        return replace(self, messages=(*earlier.messages, *self.messages), previous=earlier.previous)


def api_of(path: str) -> Api | None:
    """Which generation endpoint `path` is."""
    ends: tuple[tuple[str, Api], ...] = (
        ("/chat/completions", "chat"), ("/responses", "responses"), ("/messages", "messages"),
    )  # fmt: skip
    return next((api for end, api in ends if path.rstrip("/").endswith(end)), None)


def read(api: Api, request: bytes, answer: bytes | None, *, stream: bool) -> Conversation | None:
    """From a request's body and the answer's, if it is whole (`stream`: as server-sent events). None when the request
    cannot be understood; an answer that cannot be is left out."""
    try:
        body = _dict(json.loads(request))
        found = _READ[api](body)
    except (ValueError, TypeError, RecursionError):
        return None
    if answer is None:
        return found
    try:
        ident, said = _ANSWERS[api](list(events(answer)) if stream else [_dict(json.loads(answer))], stream)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return found
    return replace(found, messages=(*found.messages, *said), answer=ident)


def turns(conversation: Conversation) -> list[Turn]:
    """What all forms have in common of it, the system prompt first."""
    system = [Turn("system", (Part(conversation.system),))] if conversation.system else []
    return [*system, *_TURNS[conversation.api](conversation.messages)]


def events(body: bytes) -> Iterator[Dict]:
    """The objects of a stream of server-sent events."""
    data: list[str] = []
    for line in [*body.decode("utf-8", "replace").replace("\r\n", "\n").split("\n"), ""]:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            text, data = "\n".join(data), []
            if text != "[DONE]":
                yield _dict(json.loads(text))


# ---------------------------------------------------------------- requests


def _read_chat(body: Dict) -> Conversation:
    messages = _dicts(body["messages"]) if "messages" in body else _none("messages")
    system = "\n\n".join(_text(m.get("content")) for m in messages if m.get("role") in ("system", "developer"))
    return Conversation("chat", tuple(messages), system)


def _read_responses(body: Dict) -> Conversation:
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else _dicts(given)
    previous = body.get("previous_response_id")
    return Conversation(
        "responses", tuple(items), _text(body.get("instructions")), previous if isinstance(previous, str) else None
    )


def _read_messages(body: Dict) -> Conversation:
    messages = _dicts(body["messages"]) if "messages" in body else _none("messages")
    return Conversation("messages", tuple(messages), _text(body.get("system"), "\n\n"))


# ---------------------------------------------------------------- answers: their id, and the messages that they add


Said = tuple[str | None, list[Dict]]


def _chat_answer(found: list[Dict], stream: bool) -> Said:
    message: Dict = {}
    if not stream:
        message = _dict(_first(found[0].get("choices"))["message"])
        kept = ("content", "refusal", "tool_calls", "function_call", "audio", "reasoning_content")
        message = {k: message[k] for k in kept if message.get(k) not in (None, [])}
    else:
        over = False
        calls: dict[int, Dict] = {}
        for chunk in found:
            if "error" in chunk:
                raise ValueError("the stream broke")
            for choice in _dicts(chunk.get("choices")):
                if choice.get("index", 0) != 0:
                    continue
                over = over or choice.get("finish_reason") is not None
                delta = _dict(choice.get("delta") or {})
                for name in ("content", "refusal", "reasoning_content"):
                    if isinstance(delta.get(name), str):
                        message[name] = message.get(name, "") + delta[name]
                for call in _dicts(delta.get("tool_calls")):
                    _grow(calls.setdefault(int(call.get("index", len(calls))), {}), call)
        if not over:
            raise ValueError("the stream was cut")
        if calls:
            message["tool_calls"] = [calls[index] for index in sorted(calls)]
        message = {k: v for k, v in message.items() if v != ""}
    if not message:
        return _id(found), []
    if "content" not in message:
        message["content"] = None
    return _id(found), [{"role": "assistant", **message}]


def _grow(call: Dict, delta: Dict) -> None:
    """A streamed tool call: its first piece names it, each adds to its arguments."""
    function = call.setdefault("function", {"name": "", "arguments": ""})
    new = _dict(delta.get("function") or {})
    call["id"] = call.get("id") or delta.get("id") or ""
    call["type"] = call.get("type") or delta.get("type") or "function"
    function["name"] += new.get("name") or ""
    function["arguments"] += new.get("arguments") or ""


def _responses_answer(found: list[Dict], stream: bool) -> Said:
    if stream:
        ends = [e for e in found if e.get("type") in ("response.completed", "response.incomplete")]
        whole = _dict(ends[-1]["response"])
        items = _dicts(whole.get("output")) or [
            _dict(e["item"]) for e in found if e.get("type") == "response.output_item.done"
        ]
    else:
        whole = found[0]
        items = _dicts(whole["output"])
    return _id([whole]), [{k: v for k, v in item.items() if v is not None} for item in items]


def _messages_answer(found: list[Dict], stream: bool) -> Said:
    if not stream:
        blocks, ident = _dicts(found[0]["content"]), _id(found)
    else:
        blocks, ident = _streamed_blocks(found), None
        starts = [e for e in found if e.get("type") == "message_start"]
        ident = _id([_dict(starts[0]["message"])]) if starts else None
    kept = [{k: v for k, v in block.items() if v is not None} for block in blocks]
    kept = [block for block in kept if block.get("type") != "text" or block.get("text")]
    return ident, [{"role": "assistant", "content": kept}] if kept else []


def _streamed_blocks(found: list[Dict]) -> list[Dict]:
    blocks: dict[int, Dict] = {}
    inputs: dict[int, str] = {}
    over = False
    for event in found:
        kind, index = event.get("type"), int(event.get("index") or 0)
        if kind == "error":
            raise ValueError("the stream broke")
        if kind == "content_block_start":
            blocks[index] = dict(_dict(event["content_block"]))
        elif kind == "content_block_delta":
            delta = _dict(event["delta"])
            for name in ("text", "thinking", "signature"):
                if isinstance(delta.get(name), str):
                    blocks[index][name] = (blocks[index].get(name) or "") + delta[name]
            if isinstance(delta.get("partial_json"), str):
                inputs[index] = inputs.get(index, "") + delta["partial_json"]
            if "citation" in delta:
                blocks[index].setdefault("citations", [])
                blocks[index]["citations"] = [*(blocks[index]["citations"] or []), delta["citation"]]
        over = over or kind == "message_stop"
    if not over:
        raise ValueError("the stream was cut")
    for index, text in inputs.items():
        blocks[index]["input"] = json.loads(text) if text else {}
    return [blocks[index] for index in sorted(blocks)]


# ---------------------------------------------------------------- turns


def _chat_turns(messages: Iterable[Dict]) -> list[Turn]:
    out: list[Turn] = []
    for m in messages:
        role, content = m.get("role"), _parts(m.get("content"))
        if role in ("system", "developer"):
            continue  # in `Conversation.system`
        if role == "tool":
            out.append(Turn("tool", content, answers=str(m.get("tool_call_id"))))
        elif role == "assistant":
            said = content or ((Part(str(m["refusal"])),) if m.get("refusal") else ())
            calls: list[ToolCall] = []
            for call in _dicts(m.get("tool_calls")):
                function = _dict(call.get("function") or call.get("custom") or {})
                given = function.get("arguments", function.get("input"))
                calls.append(ToolCall(str(call.get("id")), str(function.get("name")), str(given or "{}")))
            out.append(Turn("assistant", said, tuple(calls)))
        else:
            out.append(Turn("user", content))
    return out


def _responses_turns(items: Iterable[Dict]) -> list[Turn]:
    out: list[Turn] = []

    def assistant(parts: tuple[Part, ...] = (), calls: tuple[ToolCall, ...] = ()) -> None:
        """One answer of the model is several items here, and one turn elsewhere."""
        last = out.pop() if out and out[-1].role == "assistant" else Turn("assistant")
        out.append(replace(last, parts=(*last.parts, *parts), calls=(*last.calls, *calls)))

    for item in items:
        kind = item.get("type") or "message"
        if kind in ("function_call", "custom_tool_call"):
            given = str(item.get("arguments") or "{}") if kind == "function_call" else json.dumps(item.get("input"))
            assistant(calls=(ToolCall(str(item.get("call_id")), str(item.get("name")), given),))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            out.append(Turn("tool", _parts(item.get("output")), answers=str(item.get("call_id"))))
        elif kind == "message" and item.get("role") == "assistant":
            assistant(_parts(item.get("content")))
        elif kind == "message":
            role = "system" if item.get("role") in ("system", "developer") else "user"
            out.append(Turn(role, _parts(item.get("content"))))
    return out


def _messages_turns(messages: Iterable[Dict]) -> list[Turn]:
    out: list[Turn] = []
    for m in messages:
        content = m.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else _dicts(content)
        if m.get("role") == "assistant":
            calls = tuple(
                ToolCall(str(b.get("id")), str(b.get("name")), json.dumps(b.get("input") or {}))
                for b in blocks
                if b.get("type") == "tool_use"
            )
            out.append(Turn("assistant", _parts([b for b in blocks if b.get("type") != "tool_use"]), calls))
            continue
        for b in blocks:
            if b.get("type") == "tool_result":
                failed = b.get("is_error") is True
                out.append(Turn("tool", _parts(b.get("content")), answers=str(b.get("tool_use_id")), failed=failed))
        rest = _parts([b for b in blocks if b.get("type") != "tool_result"])
        if rest or not blocks:
            out.append(Turn("user", rest))
    return out


_SILENT = (
    "thinking",
    "redacted_thinking",
    "reasoning",
    "reasoning_text",
    "summary_text",
)  # of the model that thought it


def _parts(content: Any) -> tuple[Part, ...]:
    """The pieces of a `content` field, whichever form it is in."""
    if isinstance(content, str):
        return (Part(content),) if content else ()
    out: list[Part] = []
    for piece in _dicts(content):
        kind = str(piece.get("type"))
        url = _image(piece)
        if url is not None:
            out.append(Part(url=url))
        elif isinstance(piece.get("text"), str):
            out.append(Part(piece["text"]))
        elif isinstance(piece.get("refusal"), str):
            out.append(Part(piece["refusal"]))
        elif kind not in _SILENT:
            out.append(Part(f"[{kind} left out]"))
    return tuple(part for part in out if part.text or part.url)


def _image(piece: Dict) -> str | None:
    """Its URL, if it is one."""
    given = piece.get("image_url")
    if piece.get("type") == "image_url" and isinstance(given, dict):
        return str(_dict(given).get("url"))
    if piece.get("type") == "input_image" and isinstance(given, str):
        return given
    source = piece.get("source")
    if piece.get("type") == "image" and isinstance(source, dict):
        found = _dict(source)
        if found.get("type") == "url":
            return str(found.get("url"))
        if found.get("type") == "base64":
            return f"data:{found.get('media_type')};base64,{found.get('data')}"
    return None


# ---------------------------------------------------------------- values from outside


def _dict(value: Any) -> Dict:
    if not isinstance(value, dict):
        raise TypeError("an object is expected")
    return cast("Dict", value)


def _dicts(value: Any) -> list[Dict]:
    """The objects in what should be a list of them."""
    return [cast("Dict", v) for v in cast("list[Any]", value) if isinstance(v, dict)] if isinstance(value, list) else []


def _first(value: Any) -> Dict:
    return _dicts(value)[0]


def _none(what: str) -> list[Dict]:
    raise ValueError(f"no {what}")


def _text(value: Any, between: str = "") -> str:
    if isinstance(value, str):
        return value
    return between.join(str(piece.get("text") or "") for piece in _dicts(value))


def _id(found: list[Dict]) -> str | None:
    ident = found[0].get("id") if found else None
    return ident if isinstance(ident, str) else None


_READ: Mapping[Api, Callable[[Dict], Conversation]] = {
    "chat": _read_chat, "responses": _read_responses, "messages": _read_messages,
}  # fmt: skip
_ANSWERS: Mapping[Api, Callable[[list[Dict], bool], Said]] = {
    "chat": _chat_answer, "responses": _responses_answer, "messages": _messages_answer,
}  # fmt: skip
_TURNS: Mapping[Api, Callable[[Iterable[Dict]], list[Turn]]] = {
    "chat": _chat_turns, "responses": _responses_turns, "messages": _messages_turns,
}  # fmt: skip
