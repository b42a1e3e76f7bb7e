"""Rows to supervised tokens, the index, packed sequences and the global order of documents."""
