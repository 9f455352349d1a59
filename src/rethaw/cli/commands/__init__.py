"""One function for each command; their docstrings are the help. `rethaw.cli.table` lists them."""
