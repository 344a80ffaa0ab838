"""Sharding: which part of a tensor is on this rank, and what ranks tell each other."""
