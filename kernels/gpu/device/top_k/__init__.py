"""Exact top-K without sorting: a bracket from a sample, settling, repair; small tensors in one program."""
