"""The kernels and what launches them. Importing a module here imports Triton."""
