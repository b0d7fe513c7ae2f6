"""nlscale: pretraining of Hope / Nested-Learning models, organised by levels of update period."""

__version__ = "0.1.0"
