"""Checkpoints: what the state of a run is, and a store that can be trusted with it."""

FOLDER = "checkpoints"
"""Of a run, in its run.dir."""
