"""Model traffic: byte-exact pass-through, recording, holding, and serving the tail after a restore (DESIGN §5).

The node makes one `Gateway` per process and one `SessionGateway` per session it knows. The rest of this package is
private to the room.
"""

from rethaw.gateway.contracts import GatewayHooks, ReleaseGate
from rethaw.gateway.gateway import Gateway
from rethaw.gateway.providers import Provider, Providers
from rethaw.gateway.session import SessionGateway

__all__ = ["Gateway", "GatewayHooks", "Provider", "Providers", "ReleaseGate", "SessionGateway"]
