"""Triton code, which runs on the GPU: the rows of kernels/reference except the random control, and what these share."""
