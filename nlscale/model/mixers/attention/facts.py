"""What softmax attention takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nlscale.config.vocabulary import Config, ModelConfig, head_dim, kv_heads
from nlscale.errors import UserError
from nlscale.model.mixers.facts import FP32, PASSES, MicroBatch, MixerFacts, element_bytes


@dataclass(frozen=True)
class AttentionFacts(MixerFacts):
    """Causal softmax attention with rotary positions, over all tokens or a window of them."""

    made_by = "nlscale.model.mixers.attention.module:Attention"
    plain_by = "nlscale.model.mixers.attention.plain:PlainAttention"
    core = "attention"
    reads_attention = True

    windowed: bool = False
    """Each token sees the `model.attention.window` last ones alone."""

    def window(self, model: ModelConfig) -> int | None:
        """Tokens that each sees; None: all."""
        return model.attention.window if self.windowed else None

    def cut(self, config: Config) -> bool:
        """Whether sequences are longer than the window."""
        return self.windowed and config.data.sequence_length > config.model.attention.window

    def check(self, model: ModelConfig) -> None:
        if head_dim(model) % 2:
            raise UserError(
                f"model.d_model / model.heads is {head_dim(model)}; rotary positions need it even"
                if model.attention.head_dim is None
                else f"model.attention.head_dim is {head_dim(model)}; rotary positions need it even"
            )
        if model.heads % kv_heads(model):
            raise UserError(
                f"model.heads {model.heads} do not share model.attention.kv_heads "
                f"{kv_heads(model)} evenly; use a divisor of {model.heads}, or null"
            )

    def plain_options(self, model: ModelConfig) -> dict[str, Any]:
        window = {"window": model.attention.window} if self.windowed else {}
        return {
            "heads": model.heads,
            "kv_heads": kv_heads(model),
            "head_dim": head_dim(model),
            "qk_norm": model.attention.qk_norm,
            "rope_base": model.rope_base,
            **window,
        }

    def whole(self, model: ModelConfig) -> int:
        return model.d_model + 2 * head_dim(model) * model.attention.qk_norm

    def parameters(self, model: ModelConfig) -> int:
        return self.whole(model) + self._products(model)

    def matrices(self, model: ModelConfig) -> dict[tuple[int, int], int]:
        d, size = model.d_model, head_dim(model)
        width, kv_width = model.heads * size, kv_heads(model) * size
        found: dict[tuple[int, int], int] = {}
        for shape in ((width, d), (kv_width, d), (kv_width, d), (d, width)):
            found[shape] = found.get(shape, 0) + 1
        return found

    def state_bytes(self, config: Config) -> int:
        """Keys and values of all tokens, or of as many as a window holds beside one."""
        model, tokens = config.model, config.data.sequence_length
        seen = model.attention.window - 1 if self.windowed else tokens
        return 2 * seen * kv_heads(model) * head_dim(model) * element_bytes(config)

    def flops(self, config: Config) -> dict[str, float]:
        """Scores and the sum of the values count the pairs that a causal mask leaves, (T + 1) / 2
        keys a token; with a window those of its first tokens, and the window's of all others."""
        model, length = config.model, config.data.sequence_length
        keys = (length + 1) / 2
        if self.cut(config):
            window = model.attention.window
            keys = window * (1 - (window - 1) / (2 * length))
        return {
            "projections": float(PASSES * 2 * self._products(model)),
            "attention": PASSES * 2 * 2 * keys * model.heads * head_dim(model),
        }

    def kept(self, batch: MicroBatch, recompute: bool) -> float:
        """What feeds both projections, and what the first makes, of which the values are a view."""
        queries, keys = self._channels(batch)
        kept = batch.residual + queries
        if recompute:
            return kept + queries + 2 * keys
        return kept + self._mixed(batch) + self._projected(batch)

    def transient(self, batch: MicroBatch, recompute: bool) -> float:
        again = self._windows(batch) if self.cut(batch.config) else 0.0
        return self._mixed(batch) + again if recompute else again

    def _products(self, model: ModelConfig) -> int:
        """Weights of both projections."""
        return 2 * model.d_model * head_dim(model) * (model.heads + kv_heads(model))

    def _channels(self, batch: MicroBatch) -> tuple[int, int]:
        """Bytes of the queries, and of the keys."""
        model, parallel = batch.config.model, batch.config.parallel
        one = batch.tokens * head_dim(model) * batch.element
        return one * batch.heads, one * kv_heads(model) // parallel.tensor

    def _repeats(self, batch: MicroBatch) -> bool:
        """Whether keys and values are copied for each head that shares them: one of torch's kernels
        takes them as they are."""
        if self.cut(batch.config):
            return False  # where they are made again, not kept
        model = batch.config.model
        d, documents = head_dim(model), batch.config.data.document_mask
        native = batch.element < FP32 and d % 8 == 0 and d <= 256 and not documents
        return kv_heads(model) < model.heads and not native

    def _windows(self, batch: MicroBatch) -> float:
        """Blocks of queries, with the keys and values of two blocks each, what they read, the mask
        of both, and gradients of all but that."""
        queries, _ = self._channels(batch)
        mask = batch.tokens * 2 * batch.config.model.attention.window * batch.element
        return 2.0 * (queries + 4 * queries + queries) + mask

    def _projected(self, batch: MicroBatch) -> float:
        """Kept as a whole where a part of it is: the values, or what is normalised."""
        queries, keys = self._channels(batch)
        by_view = batch.config.model.attention.qk_norm or not (
            self._repeats(batch) or self.cut(batch.config)
        )
        return queries + 2 * keys if by_view else 0.0

    def _mixed(self, batch: MicroBatch) -> float:
        """Rotated q and k, the values where they are no view, the output, and its log-sum-exp."""
        model, length = batch.config.model, batch.config.data.sequence_length
        queries, keys = self._channels(batch)
        if self.cut(batch.config):
            # keys and values, behind as many as come before a window's last
            kept = queries + 2 * keys * (1 + (model.attention.window - 1) / length)
        else:
            kept = 2 * queries + (2 * queries if self._repeats(batch) else keys)
            kept += batch.tokens * batch.heads * FP32
        if model.attention.qk_norm:  # roots of the norms
            shared = kv_heads(model) // batch.config.parallel.tensor
            kept += batch.tokens * (batch.heads + shared) * FP32
        angles = length * head_dim(model) // 2
        return kept + (0 if batch.compiled else 4 * angles * FP32)  # cos and sin, for q and for k
