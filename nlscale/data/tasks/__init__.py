"""Tasks: examples that a program makes, whose right answers are known, to train and score on."""

PREFIX = "task:"
"""What a source, and the tokenizer of a data folder, begins with that is a task."""
