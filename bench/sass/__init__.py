"""What the CUDA compiler made of the kernels: instructions of loops, counted without a GPU."""
