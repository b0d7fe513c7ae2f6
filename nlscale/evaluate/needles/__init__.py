"""Needles in a haystack: `nlscale eval needle`."""
