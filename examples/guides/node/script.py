"""What a model might say to main.mjs."""

from rethaw.testing.reply import by_turn

script = by_turn(["pear", "maple", "heron"])
