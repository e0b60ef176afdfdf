"""Tracking: measures and pictures of a training, read between its steps."""
