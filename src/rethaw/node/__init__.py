"""One machine's sandboxes. Reaches the control side only through the ports of `rethaw.model.ports`."""
