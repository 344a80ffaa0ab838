"""Base: what is known or measured of the wrapped optimizer, and running its own step."""
