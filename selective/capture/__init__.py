"""Capture: how the update of any base is obtained before it reaches the parameter."""
