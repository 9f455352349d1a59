"""Inside the sandbox. Standard library only, Python >= 3.9.

`guestd` is PID 1; it is put together from `loop` (poll), `wire` (the channel's guest end and every thaw), `process` (the
agent and its output), `web` and `http1` (model traffic on loopback), `calls` (the Context socket). Agents in Python use
`context`, `acontext` and `runner`.
"""
