"""A smolagents CodeAgent, whose model writes Python that runs in the same process:
`rethaw run examples/guides/smolagents/agent.py`"""

from typing import Any

import rethaw
from rethaw import Context, Image

IMAGE = Image.debian().pip_install("smolagents[openai]==1.26.0")


@rethaw.agent(image=IMAGE)
def mathematician(
    ctx: Context, goal: str = "What is the sum of the squares of the first ten primes?", model: str = "gpt-5-mini"
) -> dict[str, Any]:
    from smolagents import CodeAgent, OpenAIModel, tool

    calls: list[int] = []

    @tool
    def is_prime(number: int) -> bool:
        """Whether a number is prime.

        Args:
            number: The number.
        """
        calls.append(number)
        return number > 1 and all(number % n for n in range(2, int(number**0.5) + 1))

    agent = CodeAgent(tools=[is_prime], model=OpenAIModel(model_id=model), stream_outputs=False, max_steps=10)
    answer = agent.run(goal)
    # What the model's code defined in one step is there in the next, and here.
    names = {name: value for name, value in agent.python_executor.state.items() if isinstance(value, list | int)}
    return {"answer": answer, "variables": names, "tested": len(calls)}
