"""What `explain()` prints."""
