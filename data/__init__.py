"""Rows to supervised tokens, the index, bins and the global order of documents."""
