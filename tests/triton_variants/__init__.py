"""Which Triton kernels are compiled ahead of time, one module per op.

``variants(mock)`` yields (name, compiled kernel); ``mock(dtype)`` stands for a tensor, ``kernel.warmup`` compiles.
"""
