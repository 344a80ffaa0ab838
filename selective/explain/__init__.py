"""The text that `explain()` prints."""
