"""The implementations that compete: ours through the public functions, and PyTorch's."""
