"""A Node program with a child process: `rethaw run examples/guides/node/agent.py`"""

import subprocess

import rethaw
from rethaw import Context, Image

IMAGE = (
    Image.debian()
    .npm_install("openai@6.9.1")
    .run("mkdir /program && ln -s /usr/local/lib/node_modules /program/node_modules")
    .add_local_file("main.mjs", "/program/")
    .add_local_file("tally.mjs", "/program/")
)


@rethaw.agent(image=IMAGE)
def node(ctx: Context) -> int:
    return subprocess.run(["node", "/program/main.mjs"], check=True).returncode
