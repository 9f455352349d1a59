"""The `rethaw` command inside a sandbox: Context for programs in any language, JSON in and JSON out.

    rethaw receive [--timeout 1h] [--whole]   the next inbox message; it is consumed
    rethaw send TEXT | --json JSON | -        put a message into the outbox; "-" reads it from stdin
    rethaw wait NAME [--timeout 3d]           until the signal comes; prints its payload
    rethaw url NAME                           a one-time address that completes the signal
    rethaw sleep 10m                          the session may be suspended meanwhile
    rethaw emit NAME [JSON]                   an event for the session's log
    rethaw snapshot                           take one; prints its id once it is durable
    rethaw history [--after SEQ]              the session's events, one JSON object a line
    rethaw result JSON                        what the session's caller gets
    rethaw args                               what the session was started with
    rethaw info                               session, attempt, generation

Exit codes: 0 done; 2 a value does not fit; 5 the session does not allow it; 6 Rethaw does not answer; 7 a wait ran out of its
time; 8, 10 and 11 a snapshot failed; 1 anything else. Errors are one line on stderr. A TEXT is sent as it stands; with --json it
is a JSON value. Payloads are printed as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Dict, List, Optional, Tuple, cast

from rethaw.guest.context import Context
from rethaw.model.durations import seconds
from rethaw.model.errors import InvalidInput, RethawError

# Verb -> how many words, and which options (True: it takes a value).
VERBS: Dict[str, Tuple[int, int, Dict[str, bool]]] = {
    "receive": (0, 0, {"timeout": True, "whole": False}),
    "send": (1, 1, {"json": False}),
    "wait": (1, 1, {"timeout": True}),
    "url": (1, 1, {}),
    "sleep": (1, 1, {}),
    "emit": (1, 2, {}),
    "snapshot": (0, 0, {}),
    "history": (0, 0, {"after": True}),
    "result": (1, 1, {}),
    "args": (0, 0, {}),
    "info": (0, 0, {}),
}


def parsed(argv: List[str]) -> Tuple[str, List[str], Dict[str, Any]]:
    """Verb, words and options. Raises InvalidInput."""
    verb = argv[0] if argv else ""
    if verb not in VERBS:
        raise InvalidInput(f"{verb!r} is no command of rethaw inside a sandbox", remedy="see rethaw --help")
    least, most, known = VERBS[verb]
    words: List[str] = []
    options: Dict[str, Any] = {}
    rest = list(argv[1:])
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += rest
            break
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--"):
            words.append(word)
        elif name not in known:
            raise InvalidInput(f"rethaw {verb} has no option {word!r}", remedy="see rethaw --help")
        elif not known[name]:
            options[name] = True
        elif equals or rest:
            options[name] = value if equals else rest.pop(0)
        else:
            raise InvalidInput(f"{word} of rethaw {verb} needs a value", remedy="see rethaw --help")
    if not least <= len(words) <= most:
        wanted = str(least) if least == most else f"{least} or {most}"
        raise InvalidInput(f"rethaw {verb} takes {wanted} words, not {words!r}", remedy="see rethaw --help")
    return verb, words, options


def value_of(text: str, what: str) -> Any:
    """JSON text as a value. Raises InvalidInput."""
    try:
        return json.loads(_stdin_or(text))
    except ValueError as error:
        raise InvalidInput(f"{what} is not JSON: {error}", remedy="quote text twice: '\"text\"'") from None


def _stdin_or(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def run(verb: str, words: List[str], options: Dict[str, Any], context: Context) -> Optional[str]:
    """What is to be printed, if anything."""
    timeout = options.get("timeout")
    if verb == "receive":
        message = context.receive(timeout=timeout)
        raw = message.raw.decode("utf-8", "surrogatepass")
        if not options.get("whole"):
            return raw
        return '{"number":%d,"id":%s,"payload":%s}' % (message.number, json.dumps(message.id), raw)
    if verb == "send":
        context.send(value_of(words[0], "the message") if options.get("json") else _stdin_or(words[0]))
    elif verb == "wait":
        raw = context.wait(words[0], timeout=timeout).raw
        return (raw or b"null").decode("utf-8", "surrogatepass")
    elif verb == "url":
        return context.signal(words[0]).url
    elif verb == "sleep":
        context.sleep(seconds(words[0]))
    elif verb == "emit":
        found: Any = value_of(words[1], "the data") if len(words) > 1 else {}
        if not isinstance(found, dict):
            raise InvalidInput(f"the data of {words[0]!r} is no JSON object", remedy="write it like '{\"done\": 3}'")
        context.emit(words[0], **cast("Dict[str, Any]", found))
    elif verb == "snapshot":
        return context.snapshot()
    elif verb == "history":
        after = options.get("after", "0")
        if not (after.isascii() and after.isdigit()):
            raise InvalidInput(f"--after {after!r} is no position", remedy="pass the seq of an event")
        events = [event for event in context.history() if event["seq"] > int(after)]
        return "\n".join(json.dumps(event) for event in events) if events else None
    elif verb == "result":
        context.result(value_of(words[0], "the result"))
    elif verb == "args":
        return json.dumps(context.args)
    else:
        about = {"session": context.session, "attempt": context.attempt, "generation": context.generation}
        return json.dumps(about)
    return None


def main(argv: Optional[List[str]] = None) -> int:
    """The exit code."""
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] in ("--help", "-h", "help") or "--help" in given[1:2]:
        sys.stdout.write(__doc__ or "")
        return 0 if given else 2
    try:
        verb, words, options = parsed(given)
        said = run(verb, words, options, Context())
        if said is not None:
            sys.stdout.write(said + "\n")
            sys.stdout.flush()
    except RethawError as error:
        sys.stderr.write(f"rethaw: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
