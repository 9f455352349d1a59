"""What a failed session's program wrote last: for most failures that is the whole explanation."""

from __future__ import annotations

from typing import Any

from rethaw.control import rows
from rethaw.control.rows import Conn, Row
from rethaw.log.encoding import unpack

LINES, BYTES = 10, 2048
_PAGE = 32


async def last_words(conn: Conn, row: Row) -> dict[str, Any] | None:
    """The end of stderr in the session's last attempt, of stdout when it wrote nothing there; None when nothing at all.
    {"stream": "stderr", "lines": [at most LINES, together at most BYTES], "cut": whether there was more}."""
    for stream in ("stderr", "stdout"):
        data, whole = await _tail(conn, row, stream)
        if data.strip():
            lines = data.decode(errors="replace").rstrip().splitlines()
            if not whole and len(lines) > 1 and len(lines) <= LINES:
                del lines[0]  # it has lost its beginning
            return {"stream": stream, "lines": lines[-LINES:], "cut": not whole or len(lines) > LINES}
    return None


async def _tail(conn: Conn, row: Row, stream: str) -> tuple[bytes, bool]:
    """The last BYTES or fewer that the path has of `stream`, and whether that is all of it."""
    data, start, before = b"", None, row.last_seq + 1
    while True:
        found = await rows.many(
            conn,
            """SELECT e.seq, e.data, e.size, e.codec, e.body FROM events e
               JOIN rethaw_path(%s, %s) p ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
               WHERE e.type = 'output' AND e.attempt = %s AND e.data->>'stream' = %s AND e.seq < %s
               ORDER BY e.seq DESC LIMIT %s""",
            (row.id, row.line, row.attempt, stream, before, _PAGE),
        )
        for event in found:
            offset, before = int(event["data"].get("offset", 0)), event["seq"]
            body = unpack(event["body"], event["codec"], event["size"]) if event["body"] is not None else b""
            # A life that came back may have written a part of it again.
            body = body if start is None else body[: max(0, start - offset)]
            start = offset if start is None else min(start, offset)
            data = body + data
            if len(data) > BYTES:
                return data[-BYTES:], False
        if len(found) < _PAGE:
            return data, True
