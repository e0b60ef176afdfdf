"""The benchmark program: ``python -m bench --help``, from the root of the repository."""
