"""Steps 2 to 8 of an optimizer step. The numbers are those of the docstring of `SelectiveUpdate.step`."""
