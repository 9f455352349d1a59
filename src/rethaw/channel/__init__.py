"""The framed, multiplexed byte stream between a node and a guest. Standard library only, Python >= 3.9.

`frames` is the wire format, `mux` decides what is sent next, `payload` keeps JSON payloads byte-exact. No I/O here:
both ends bring their own (`rethaw.guest.wire` polls two file descriptors, `rethaw.node.link` uses asyncio).
"""
