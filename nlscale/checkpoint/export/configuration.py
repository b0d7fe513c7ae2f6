"""The configuration of exported models, as a class of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class NlscaleConfig(PretrainedConfig):
    """What the model is made of; `nlscale` holds how it was trained.

    Args:
        vocab_size: token ids.
        hidden_size: width of the residual stream, d_model.
        num_hidden_layers: blocks.
        num_attention_heads: heads of the mixer.
        mixer: its name.
        mixer_options: what its class is made with.
        pattern: mixers of different layers, in place of `mixer` and `mixer_options`: each has these
            two, and layer i has number i mod how many there are.
        levels: of the MLPs of a block, fastest first; each has at least its `name`, its `period`
            and the `hidden` units of its MLP, 0 where it has none.
        cms: how these are composed, `sequential`, `independent` or `nested`, of which only the
            one MLP is here.
        norm_eps: added to the mean square in every RMSNorm.
        init_std: of the initial weights of a model that is made anew.
        width_multiplier: logits are divided by it (muP).
    """

    model_type = "nlscale"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 128,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 2,
        mixer: str = "",
        mixer_options: dict[str, Any] | None = None,
        pattern: Sequence[dict[str, Any]] = (),
        levels: Sequence[dict[str, Any]] = (),
        cms: str = "sequential",
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        width_multiplier: float = 1.0,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.mixer, self.mixer_options = mixer, dict(mixer_options or {})
        self.pattern = list(pattern)
        self.levels, self.cms, self.norm_eps = list(levels), cms, norm_eps
        self.init_std, self.width_multiplier = init_std, width_multiplier
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def mixers(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of the mixer of each block."""
        one = {"mixer": self.mixer, "mixer_options": self.mixer_options}
        entries = self.pattern or [one]
        chosen = [entries[i % len(entries)] for i in range(self.num_hidden_layers)]
        return [(entry["mixer"], entry["mixer_options"]) for entry in chosen]
