"""Dialects, one file each."""
