"""What makes sandboxes: the interface (`base`), gVisor, and what engines share. Knows nothing of sessions."""
