"""Sandboxes with a kernel of their own, in virtual machines."""
