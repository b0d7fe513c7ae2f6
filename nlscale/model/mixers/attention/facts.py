"""What softmax attention takes."""

from __future__ import annotations

from nlscale.config.vocabulary import Config, ModelConfig, head_dim
from nlscale.errors import UserError
from nlscale.model.mixers.facts import FP32, PASSES, MicroBatch, MixerFacts


class AttentionFacts(MixerFacts):
    """Causal softmax attention with rotary positions."""

    made_by = "nlscale.model.mixers.attention.module:Attention"
    core = "attention"

    def check(self, model: ModelConfig) -> None:
        if head_dim(model) % 2:
            raise UserError(
                f"model.d_model / model.heads is {head_dim(model)}; rotary positions need it even"
            )

    def parameters(self, model: ModelConfig) -> int:
        return model.d_model + 4 * model.d_model**2

    def flops(self, config: Config) -> dict[str, float]:
        """Scores and the sum of the values count the pairs that a causal mask leaves, (T + 1) / 2
        keys a token."""
        width, keys = config.model.d_model, (config.data.sequence_length + 1) / 2
        return {
            "projections": float(PASSES * 2 * 4 * width**2),
            "attention": PASSES * 2 * 2 * keys * width,
        }

    def kept(self, batch: MicroBatch, recompute: bool) -> float:
        """The values are a view of the projection, which is kept in any case."""
        kept = batch.residual + batch.channels + 3 * batch.channels
        return kept if recompute else kept + self._mixed(batch)

    def transient(self, batch: MicroBatch, recompute: bool) -> float:
        return self._mixed(batch) if recompute else 0.0

    def _mixed(self, batch: MicroBatch) -> float:
        """Rotated q and k, the output, and its log-sum-exp."""
        kept = 3 * batch.channels + batch.tokens * batch.heads * FP32
        angles = batch.config.data.sequence_length * head_dim(batch.config.model) // 2
        return kept + (0 if batch.compiled else 4 * angles * FP32)  # cos and sin, for q and for k
