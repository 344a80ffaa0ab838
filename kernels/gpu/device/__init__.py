"""Triton code: what runs on the GPU, one file for each row that kernels/reference has."""
