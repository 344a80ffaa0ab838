"""One step: looking at the gradients, running the jobs."""
