"""Loss by position in the context: `nlscale eval loss`."""
