"""Needles in a haystack, as text: keys with values hidden in it, and a question at its end."""
