"""Few-shot data: classes, their words, and their images, wherever they come from."""
