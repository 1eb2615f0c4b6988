"""Triton kernels, one file per op; installed as capt.kernels. Importing this package does not need Triton."""
