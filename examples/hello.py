"""The smallest agent: it answers each message, for as long as messages come. `rethaw run examples/hello.py`"""

import rethaw


@rethaw.agent
def hello(ctx: rethaw.Context) -> None:
    for count, message in enumerate(ctx.messages(idle="7d"), start=1):
        ctx.send(f"{count}. Hello, {message.payload}!")
