"""Parameter groups by kind of parameter."""
