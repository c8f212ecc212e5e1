"""Prompts and batches.  Import from the modules; this package itself pulls in nothing (login nodes have no torch)."""
