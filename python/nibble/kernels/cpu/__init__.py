"""C kernels for small batches on a CPU. The functions are those of kernels/torch; larger batches are left to it."""
