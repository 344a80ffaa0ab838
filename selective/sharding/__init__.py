"""Sharding: this rank's part of a sharded tensor, and collectives between the ranks that share it."""
