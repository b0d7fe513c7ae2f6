"""Exports of checkpoints, and models of others as such exports."""

NO_DATA = "none"
"""`data.dir` of an export that was trained on no data that nlscale knows of: an imported one."""
