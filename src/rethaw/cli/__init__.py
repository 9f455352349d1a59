"""The command line: thin over the SDK. `main.main` is the entry point."""
