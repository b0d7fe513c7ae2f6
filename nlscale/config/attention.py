"""The section `model.attention`: softmax attention."""

from __future__ import annotations

from dataclasses import dataclass

from nlscale.config.fields import MOST, within


@dataclass
class AttentionConfig:
    """Softmax attention, the mixers `attention` and `sliding-window`; others take the defaults
    alone."""

    kv_heads: int | None = within(None, above=0, most=MOST)
    """Heads of keys and values, each shared by as many of `model.heads` (grouped-query attention);
    null: as many as those."""
    head_dim: int | None = within(None, above=0, most=MOST)
    """Dimension of a head; null: model.d_model / model.heads."""
    qk_norm: bool = False
    """RMS-normalise queries and keys along each head, before they are rotated (as in Qwen3)."""
    window: int = within(128, above=0, most=MOST)
    """Tokens that a token of `sliding-window` sees, itself among them."""
