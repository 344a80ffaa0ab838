"""ChainedOptimizer: several optimizers as one, each over its own part of a model's parameters."""
