"""Optimizers and wrappers that the library does not have: they are measured before they are built."""
