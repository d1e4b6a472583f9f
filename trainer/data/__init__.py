"""From any file to micro-batches."""
