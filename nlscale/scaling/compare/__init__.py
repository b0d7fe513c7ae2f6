"""`nlscale compare`: whether runs differ by more than their seeds do."""
