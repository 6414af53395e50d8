"""Triton kernels for GPUs: the same page bytes as every other backend. Imported only where they are chosen."""
