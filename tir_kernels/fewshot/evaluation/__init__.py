"""Evaluation of classifiers on labelled images: numbers, their intervals, and files of them."""
