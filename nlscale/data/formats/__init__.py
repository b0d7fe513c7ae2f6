"""Formats of sources; `nlscale.data.documents` has the table of them."""
