"""What a model might say to agent.py."""

from rethaw.testing.conversation import ProviderRequest
from rethaw.testing.reply import Reply


def script(request: ProviderRequest) -> Reply:
    basket = request.last_text.splitlines()[1]
    wanted = ["apple", "tea", "apple"]
    have = 0 if basket == "nothing" else len(basket.split(", "))
    return Reply(wanted[have] if have < len(wanted) else "done")
