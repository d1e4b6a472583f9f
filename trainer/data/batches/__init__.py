"""Records to micro-batches, in order."""
