"""Training: the loop over steps, episodes at once, CUDA graphs and memory."""
