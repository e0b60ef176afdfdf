"""Classifying images of any number: where they come from, what is written, and the loop between."""
