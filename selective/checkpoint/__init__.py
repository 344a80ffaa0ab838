"""Checkpoints: saving, loading, and refusing in words what does not fit."""
