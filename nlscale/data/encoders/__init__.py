"""Tokenizers; `nlscale.data.tokenizer` chooses among them, and reads and trains them."""
