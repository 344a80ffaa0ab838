"""What the library does not have: optimizers and wrappers that are measured before they are built."""
