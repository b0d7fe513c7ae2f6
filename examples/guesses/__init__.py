"""How often the most likely token is the one that follows: `nlscale eval guesses`."""
