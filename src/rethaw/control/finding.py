"""Finding sessions: by state, agent, tags, queue, time, and by text in what they were started with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rethaw.control import rows
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import State
from rethaw.model.errors import InvalidInput


@dataclass(frozen=True)
class Filter:
    """What a session must be like; what is None or empty is not asked. `tags`: it has all of them. `search`: a text in its
    agent's name, its key, its tags or its arguments, whatever its case. `after`, `before`: when it was created."""

    states: tuple[State, ...] = ()
    agent: str | None = None
    tags: tuple[str, ...] = ()
    queue: str | None = None
    search: str | None = None
    after: datetime | None = None
    before: datetime | None = None


async def find(conn: Conn, wanted: Filter, limit: int, cursor: str | None) -> tuple[list[Row], str | None]:
    """Newest first; the second is the cursor of the next page."""
    texts = [wanted.search, wanted.agent, wanted.queue, cursor, *wanted.tags]
    if any(text is not None and "\0" in text for text in texts):
        raise InvalidInput("a text to look for cannot hold NUL", remedy="leave it out")
    values: dict[str, Any] = {
        "states": [state.value for state in wanted.states] or None,
        "agent": wanted.agent,
        "tags": list(wanted.tags) or None,
        "queue": wanted.queue,
        "search": wanted.search or None,
        "escaped": _escaped(wanted.search or ""),
        "after": wanted.after,
        "before": wanted.before,
        "cursor": cursor,
        "limit": limit + 1,
    }
    found = await rows.select(
        conn,
        """WHERE (%(states)s::text[] IS NULL OR s.state = ANY(%(states)s))
           AND (%(agent)s::text IS NULL OR s.agent_name = %(agent)s)
           AND (%(tags)s::text[] IS NULL OR p.tags @> %(tags)s)
           AND (%(queue)s::text IS NULL OR p.queue = %(queue)s)
           AND (%(after)s::timestamptz IS NULL OR s.created_at >= %(after)s)
           AND (%(before)s::timestamptz IS NULL OR s.created_at < %(before)s)
           AND (%(search)s::text IS NULL OR strpos(lower(s.agent_name), lower(%(search)s)) > 0
                OR strpos(lower(coalesce(s.key, '')), lower(%(search)s)) > 0
                OR strpos(lower(array_to_string(p.tags, ' ')), lower(%(search)s)) > 0
                OR EXISTS (SELECT 1 FROM unnest(%(escaped)s::text[]) e WHERE strpos(lower(p.args), e) > 0))
           AND (%(cursor)s::text IS NULL OR s.id < %(cursor)s) ORDER BY s.id DESC LIMIT %(limit)s""",
        values,
    )
    return found[:limit], found[limit - 1].id if len(found) > limit else None


def _escaped(text: str) -> list[str]:
    """How `text` may stand in arguments: they are JSON text in ASCII, where letters beyond it have numbers."""
    return sorted({json.dumps(one)[1:-1].lower() for one in (text, text.lower(), text.upper(), text.title())})
