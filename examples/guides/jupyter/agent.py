"""A model that works in a Jupyter kernel, cell by cell: `rethaw run examples/guides/jupyter/agent.py`"""

import queue
import re
from typing import Any

import rethaw
from rethaw import Context, Image

IMAGE = Image.debian().pip_install("jupyter_client==8.10.0", "ipykernel==7.4.0", "openai==3.57.0")
SYSTEM = (
    "You work in a Jupyter notebook. Answer with one cell in ```python fences; you are told what it printed. "
    "When you are done, answer without code."
)


class Notebook:
    """A kernel: a process of its own, reached through sockets on loopback."""

    def __init__(self) -> None:
        from jupyter_client.manager import start_new_kernel

        self.manager, self.client = start_new_kernel(kernel_name="python3")

    def run(self, cell: str) -> str:
        asked = self.client.execute(cell)
        out: list[str] = []
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=60)
            except queue.Empty:
                return "".join(out) + "\n(no answer for 60 s)"
            content = message["content"]
            if message["parent_header"].get("msg_id") != asked:
                continue
            if message["msg_type"] == "stream":
                out.append(content["text"])
            elif message["msg_type"] == "execute_result":
                out.append(content["data"].get("text/plain", ""))
            elif message["msg_type"] == "error":
                out.append(f"{content['ename']}: {content['evalue']}")
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return "".join(out).strip()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel()


@rethaw.agent(image=IMAGE)
def analyst(
    ctx: Context, goal: str = "What is the mean of 3, 1, 4, 1, 5, 9, 2, 6?", model: str = "gpt-5-mini"
) -> dict[str, Any]:
    from openai import OpenAI

    client = OpenAI()
    notebook = Notebook()
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": goal}]
    while True:
        answer = client.chat.completions.create(model=model, messages=messages).choices[0].message.content or ""
        messages.append({"role": "assistant", "content": answer})
        cell = re.search(r"```python\n(.*?)```", answer, re.DOTALL)
        if cell is None:
            break
        said = notebook.run(cell[1])
        print(f"In:  {cell[1].strip()}\nOut: {said}", flush=True)
        messages.append({"role": "user", "content": f"It printed:\n{said}"})
    variables = notebook.run("%who_ls")
    notebook.close()
    return {"answer": answer, "variables": variables}
