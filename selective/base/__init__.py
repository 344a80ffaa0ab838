"""Base: facts about the wrapped optimizer, from a table or from a measurement, and calls of its own step."""
