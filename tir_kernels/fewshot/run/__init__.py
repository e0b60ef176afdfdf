"""Runs: the loop over episodes, their journal, folder, locks, summary and progress."""
