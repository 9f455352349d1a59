"""The gVisor engine: `runsc` with the systrap platform, no network, and a root overlay that lives in memory."""
