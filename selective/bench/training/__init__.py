"""`selective bench --training`: the cost of an optimizer's step in the parameter groups that training has."""
