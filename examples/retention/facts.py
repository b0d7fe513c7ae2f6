"""What retention takes: parameters, FLOPs and activations, for plans and summaries (no torch)."""

from __future__ import annotations

from nlscale.config.vocabulary import Config, ModelConfig
from nlscale.model.mixers.facts import PASSES, MicroBatch, MixerFacts


class RetentionFacts(MixerFacts):
    """Retention (Sun et al. 2023), in the parallel form: all pairs of tokens of a sequence."""

    made_by = "examples.retention.module:Retention"
    core = "retention"

    def parameters(self, model: ModelConfig) -> int:
        return model.d_model + 4 * model.d_model**2

    def flops(self, config: Config) -> dict[str, float]:
        width, length = config.model.d_model, config.data.sequence_length
        return {
            "projections": float(PASSES * 2 * 4 * width**2),
            "retention": float(PASSES * 2 * 2 * length * width),
        }

    def kept(self, batch: MicroBatch, recompute: bool) -> float:
        kept = batch.residual + batch.channels + 3 * batch.channels
        return kept if recompute else kept + self._mixed(batch)

    def transient(self, batch: MicroBatch, recompute: bool) -> float:
        return self._mixed(batch) if recompute else 0.0

    def _mixed(self, batch: MicroBatch) -> float:
        """Scores, before and after they decay, and what is read, before and after its norm."""
        pairs = batch.tokens * batch.config.data.sequence_length * batch.heads
        return 2 * pairs * batch.element + 2 * batch.channels
