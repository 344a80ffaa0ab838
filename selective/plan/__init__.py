"""Plan: for each parameter group, which parameters are stepped, how, and in which space."""
