"""Sessions for MCP clients, over the SDK: what the tools take and give is in `shapes`, what they do in `tools`."""
