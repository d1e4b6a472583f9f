"""Writes balanced tar shards with an index from the rows of any source."""
