"""Micro-benchmarks of single calls, for ``pytest bench/micro --benchmark-only``."""
