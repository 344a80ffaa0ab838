"""Errors and warnings in plain words, where the cause is known to somebody else: pydantic, Python, another class."""
