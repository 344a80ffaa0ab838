"""Capture: obtaining the update of any base before it reaches the parameter."""
