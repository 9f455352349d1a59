"""Records on the stream of a program beside the agent: kind (1 byte), length (4 bytes, big-endian), that many bytes."""

from __future__ import annotations

import struct

RECORD = struct.Struct(">BI")
INPUT, INPUT_END, SIZE = 0, 1, 2  # from the node; a size: columns, rows, 2 bytes each
STDOUT, STDERR, EXIT = 1, 2, 3  # to the node; an exit: its code, 4 bytes
