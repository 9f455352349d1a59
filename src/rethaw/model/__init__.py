"""The words every room shares: ids, enums, durations, errors, wire types and ports.

`errors` and `durations` use the standard library only and run on Python 3.9, so that the guest can import them.
Nothing is imported here, so `import rethaw.model` costs nothing.
"""
