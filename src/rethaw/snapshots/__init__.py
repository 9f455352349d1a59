"""Snapshots as files: staged in memory, compressed, written durably, verified, read back."""
