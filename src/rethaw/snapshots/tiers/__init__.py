"""Where objects beyond the node's own files are kept: a directory, or an S3-compatible bucket."""
