"""SelectiveUpdate.for_model: an optimizer for a whole model, from a few words."""
