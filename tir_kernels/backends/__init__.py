"""The implementations behind the operators, each behind the contract in ``protocol.py``."""
