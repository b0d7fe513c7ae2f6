"""lm-evaluation-harness on models of this package: the adapter, its tasks and their figures."""
