"""Writes a conversation in a provider's form, so that it can be sent there as it is. Pure functions.

In its own form a conversation goes back as it was sent. In another one it keeps texts, images, tool calls and their
results, and the system prompt; what the model thought stays with the model that thought it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from rethaw.gateway.conversation import Api, Conversation, Dict, Part, ToolCall, Turn, turns

Form = Literal["openai", "responses", "anthropic"]
FORMS: dict[str, Api] = {"openai": "chat", "responses": "responses", "anthropic": "messages"}
_ID_LIMIT = 40  # of a tool call; the smallest of the providers' limits
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w=.-]+)*;base64,(.*)", re.DOTALL)
_BEGIN = "(The conversation begins with the assistant.)"
_NOTHING = "(nothing)"


def written(conversation: Conversation, form: Form) -> tuple[list[Dict], str]:
    """The messages, and the system prompt: of "openai" it is among the messages too."""
    api = FORMS[form]
    if conversation.api == api:
        return list(conversation.messages), conversation.system
    found = turns(conversation)
    system = "\n\n".join(turn.text for turn in found if turn.role == "system")
    return _WRITE[api](found), system


# ---------------------------------------------------------------- Chat Completions


def _chat(found: Sequence[Turn]) -> list[Dict]:
    out: list[Dict] = []
    for turn in found:
        if turn.role == "tool":
            out.append({"role": "tool", "tool_call_id": _call_id(turn.answers), "content": _flat(turn) or _NOTHING})
        elif turn.role == "assistant":
            if not turn.calls and not turn.parts:
                continue
            message: Dict = {"role": "assistant", "content": _flat(turn) or None}
            if turn.calls:
                message["tool_calls"] = [
                    {
                        "id": _call_id(call.id),
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in turn.calls
                ]
            out.append(message)
        elif turn.role == "user":
            out.append({"role": "user", "content": _content(turn, _chat_part)})
        else:
            out.append({"role": "system", "content": turn.text})
    return out


def _chat_part(part: Part) -> Dict:
    if part.url is not None:
        return {"type": "image_url", "image_url": {"url": part.url}}
    return {"type": "text", "text": part.text}


# ---------------------------------------------------------------- Responses


def _responses(found: Sequence[Turn]) -> list[Dict]:
    out: list[Dict] = []
    for turn in found:
        if turn.role == "tool":
            output = _flat(turn) or _NOTHING
            out.append({"type": "function_call_output", "call_id": _call_id(turn.answers), "output": output})
        elif turn.role == "assistant":
            if text := _flat(turn):
                out.append({"role": "assistant", "content": text})
            out += [
                {
                    "type": "function_call",
                    "call_id": _call_id(call.id),
                    "name": call.name,
                    "arguments": call.arguments,
                }
                for call in turn.calls
            ]
        elif turn.role == "user":
            out.append({"role": "user", "content": _content(turn, _responses_part)})
    return out


def _responses_part(part: Part) -> Dict:
    if part.url is not None:
        return {"type": "input_image", "image_url": part.url, "detail": "auto"}
    return {"type": "input_text", "text": part.text}


# ---------------------------------------------------------------- Anthropic Messages


def _messages(found: Sequence[Turn]) -> list[Dict]:
    """Roles take turns, the user begins, results of tools come first in the message after their calls, no text is empty."""
    out: list[Dict] = []

    def add(role: str, blocks: list[Dict]) -> None:
        if not blocks:
            return
        if not out and role == "assistant":
            out.append({"role": "user", "content": [{"type": "text", "text": _BEGIN}]})
        if out and out[-1]["role"] == role:
            cast("list[Dict]", out[-1]["content"]).extend(blocks)
        else:
            out.append({"role": role, "content": blocks})

    for turn in found:
        blocks = [_block(part) for part in turn.parts]
        if turn.role == "tool":
            result: Dict = {"type": "tool_result", "tool_use_id": _call_id(turn.answers)}
            add(
                "user",
                [{**result, **({"content": blocks} if blocks else {}), **({"is_error": True} if turn.failed else {})}],
            )
        elif turn.role == "assistant":
            add("assistant", [*blocks, *(_use(call) for call in turn.calls)])
        elif turn.role == "user":
            add("user", blocks)
    return out


def _block(part: Part) -> Dict:
    if part.url is None:
        return {"type": "text", "text": part.text}
    data = _DATA_URL.fullmatch(part.url)
    if data is None:
        return {"type": "image", "source": {"type": "url", "url": part.url}}
    return {"type": "image", "source": {"type": "base64", "media_type": data[1] or "image/png", "data": data[2]}}


def _use(call: ToolCall) -> Dict:
    try:
        given: Any = json.loads(call.arguments)
    except ValueError:
        given = call.arguments
    return {
        "type": "tool_use",
        "id": _call_id(call.id),
        "name": call.name,
        "input": given if isinstance(given, dict) else {"input": given},
    }


# ---------------------------------------------------------------- in common


def _content(turn: Turn, piece: Callable[[Part], Dict]) -> Any:
    """Text alone as a string, as people write it."""
    if any(part.url is not None for part in turn.parts):
        return [piece(part) for part in turn.parts]
    return turn.text


def _flat(turn: Turn) -> str:
    """As text, where a form has nothing else."""
    return "".join(part.text if part.url is None else "[image left out]" for part in turn.parts)


def _call_id(ident: str) -> str:
    """An id that every provider takes; equal ones stay equal."""
    if re.fullmatch(rf"[A-Za-z0-9_-]{{1,{_ID_LIMIT}}}", ident):
        return ident
    return f"call_{hashlib.sha256(ident.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"


_WRITE: dict[Api, Callable[[Sequence[Turn]], list[Dict]]] = {
    "chat": _chat, "responses": _responses, "messages": _messages,
}  # fmt: skip
