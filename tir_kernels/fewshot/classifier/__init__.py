"""Classifiers: made from labelled images, saved as folders, and asked about other images."""
