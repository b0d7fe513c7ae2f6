"""`nlscale bench device`: what a new kind of GPU, or a new cluster, is accepted by."""
