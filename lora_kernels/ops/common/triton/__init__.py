"""Triton kernels and pieces of kernels that several families share."""
