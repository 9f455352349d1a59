"""The agents of one test file in one code archive: one image and sandboxes made ahead for all of them."""

from __future__ import annotations

import re
from typing import Any

from e2e_fixtures import House, Session


class Agents:
    """`name = agents.add(code)` where a test stands; `agents.start(house, name)` in it. `code` defines `main`. With
    `async def main` there is a blocking form as well: the same without the words that asyncio needs."""

    def __init__(self) -> None:
        self._parts = ["import asyncio, rethaw, signal, sys\n"]
        self._count = 0

    def add(self, code: str) -> str:
        name = f"agent_{self._count}"
        self._count += 1
        if "async def main(" in code:
            self._parts.append(code.replace("async def main(", f"async def {name}_asyncio("))
            code = re.sub(r"\b(async|await) ", "", code)
        self._parts.append(code.replace("def main(", f"def {name}("))
        return name

    def start(
        self,
        home: House,
        name: str,
        args: dict[str, Any] | None = None,
        *,
        style: str = "blocking",
        key: str | None = None,
        **spec: Any,
    ) -> Session:
        function = name if style == "blocking" else f"{name}_{style}"
        return home.agent("\n".join(self._parts), args, key, **{"entry": f"agent.py::{function}", **spec})
