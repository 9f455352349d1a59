"""What a model might say to work.sh."""

from rethaw.testing.reply import by_turn

script = by_turn(["42", "7", "1"])
