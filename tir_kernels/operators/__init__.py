"""The operators: their checks, schemas, fake kernels and gradients, and the choice of a backend."""
