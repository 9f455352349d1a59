"""Books payments in one SQLite transaction and asks a model about each: `rethaw run examples/guides/sqlite/agent.py`"""

import json
import os
import sqlite3
import urllib.request
from pathlib import Path
from typing import Any

import rethaw
from rethaw import Context

PAYMENTS = [("Bakery Miller", 430), ("Railways", 2990), ("Book shop", 1850)]


def category(payee: str, model: str) -> str:
    """One word from the model; plain HTTP, so that no package is needed."""
    question = f"Name the category of a payment to {payee!r} in one word."
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": model, "messages": [{"role": "user", "content": question}]}).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["choices"][0]["message"]["content"].strip().lower()


@rethaw.agent
def bookkeeper(ctx: Context, model: str = "gpt-5-mini") -> dict[str, Any]:
    Path("/data").mkdir()
    ours = sqlite3.connect("/data/ledger.db", isolation_level=None)
    ours.execute("PRAGMA journal_mode=WAL")
    ours.execute("CREATE TABLE payment (payee TEXT, cents INTEGER, category TEXT)")
    others = sqlite3.connect("/data/ledger.db", isolation_level=None, timeout=0)
    seen: list[int] = []

    ours.execute("BEGIN IMMEDIATE")  # the write lock is ours until the end, whatever happens to us
    for payee, cents in PAYMENTS:
        ours.execute("INSERT INTO payment VALUES (?, ?, NULL)", (payee, cents))
        word = category(payee, model)  # a snapshot is taken in here
        ours.execute("UPDATE payment SET category = ? WHERE payee = ?", (word, payee))
        seen.append(others.execute("SELECT count(*) FROM payment").fetchone()[0])
        try:
            others.execute("BEGIN IMMEDIATE")
            locked = False
        except sqlite3.OperationalError:
            locked = True
        print(f"{payee}: {word}; another connection sees {seen[-1]} payments, locked out: {locked}", flush=True)
    ours.execute("COMMIT")

    rows = others.execute("SELECT payee, cents, category FROM payment ORDER BY rowid").fetchall()
    check = others.execute("PRAGMA integrity_check").fetchone()[0]
    return {"rows": [list(row) for row in rows], "seen_before": seen, "integrity": check}
