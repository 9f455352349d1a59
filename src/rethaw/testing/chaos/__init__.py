"""Chaos: kill parts of a running Rethaw at random moments and at named points, then check its promises.

`python -m rethaw.testing.chaos --seed 7` runs one seed; see `plan` for what a seed means.
"""
