"""What a model might say to agent.py."""

from rethaw.testing.provider import ProviderRequest


def script(request: ProviderRequest) -> str:
    return request.last_text.split("'")[1].split()[0]
