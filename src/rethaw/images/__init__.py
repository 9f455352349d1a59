"""Root filesystems that engines boot: a Debian base, a layer of Python packages, the guest's own modules, the agent's code.

Each layer is a complete tree whose unchanged files are hard links to the layer below, so a tree costs its own files
only. Trees are read-only by agreement: sandboxes write to an overlay in their memory.
"""
