"""Triton code, which runs on the GPU: a file for each row that kernels/reference has, and what these share."""
