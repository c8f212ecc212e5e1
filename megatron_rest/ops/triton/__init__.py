"""CUDA kernels of the row passes: one read for the statistics, one read and one write for the gradient.

``megatron_rest.ops`` picks them by itself on CUDA tensors where the triton package is installed.  Nothing here is
needed, or imported, on CPU.
"""

from megatron_rest.ops.triton.row_kernels import write_gradient, write_partials

__all__ = ["write_gradient", "write_partials"]
