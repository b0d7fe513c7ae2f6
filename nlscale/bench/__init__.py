"""Measurements of what the plan promises, on this machine."""
