"""The K-th largest score without sorting: bracket from a sample, settle, repair; small tensors at once."""
