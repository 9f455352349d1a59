"""Every error leaves as {"error": {code, message, remedy, details}}; what nobody foresaw leaves as an id that is logged."""

from __future__ import annotations

import json
import logging
import re
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rethaw.model.errors import InvalidInput, NotFound, RethawError, TooLarge
from rethaw.model.ids import new_id

log = logging.getLogger("rethaw.api")


_MAYBE_LONE = re.compile(r"\\ud[89a-f]")


def dump(value: Any) -> bytes:
    """JSON in ASCII. Lone surrogates in metadata become U+FFFD: strict parsers refuse them (bodies travel in base64)."""
    text = json.dumps(value, default=str, separators=(",", ":"))
    if _MAYBE_LONE.search(text):
        text = json.dumps(json.loads(text, object_hook=_whole, strict=False), separators=(",", ":"))
    return text.encode("ascii")


def _whole(found: dict[str, Any]) -> dict[str, Any]:
    return {_mend(k): _mend(v) for k, v in found.items()}


def _mend(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_mend(v) for v in cast("list[Any]", value)]
    return value


class Ascii(Response):
    """A JSON answer for values that may hold any string."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump(content)


def body(code: str, message: str, remedy: str | None = None, details: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "remedy": remedy, "details": details or {}}}


def answer(error: RethawError, headers: dict[str, str] | None = None) -> Response:
    """The HTTP form of one of our errors."""
    if error.status >= 500:
        log.warning("%s: %s", error.code, error)
    return Ascii(body(error.code, error.message, error.remedy, error.details), error.status, headers)


def install(app: FastAPI) -> None:
    """Register the handlers."""

    @app.exception_handler(RethawError)
    async def _ours(request: Request, error: RethawError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(_first(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            return answer(NotFound(f"there is nothing at {where}", remedy="see /openapi.json"))
        if error.status_code == 413:
            return answer(TooLarge(str(error.detail)))
        if error.status_code == 405:
            return Ascii(body("invalid_input", f"{where} is not allowed", "see /openapi.json"), 405, error.headers)
        return Ascii(body("invalid_input", f"{where}: {error.detail}"), error.status_code, error.headers)

    _ = (_ours, _invalid, _http)


def unforeseen(where: str, error: Exception) -> Response:
    """An answer that tells nothing but an id; the log tells the rest."""
    mark = new_id("e")
    log.error("%s failed (%s)", where, mark, exc_info=error)
    message = f"internal error {mark}"
    return Ascii(body("error", message, f"look for {mark} in the server's log", {"id": mark}), 500)


def _first(error: RequestValidationError) -> InvalidInput:
    """One line that names where and what."""
    problems = error.errors()
    problem: dict[str, Any] = dict(problems[0]) if problems else {"loc": (), "msg": "invalid"}
    place = [str(part) for part in problem.get("loc", ())]
    if problem.get("type") == "json_invalid":
        reason = cast("dict[str, Any]", problem.get("ctx") or {}).get("error", "")
        at = place[-1] if place and place[-1].isdigit() else "?"
        return InvalidInput(f"the body is malformed JSON at character {at}: {reason}", remedy="send a valid JSON text")
    value = problem.get("input")
    shown = f", not {value!r:.80}" if isinstance(value, (str, int, float, bool)) else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return InvalidInput(f"{'.'.join(place) or 'the request'}: {problem.get('msg')}{shown}{more}", where=place)
