"""A stage of the model that answers something else than its loss while a run trains."""

from __future__ import annotations

from torch import Tensor, nn

from nlscale.model.decoder import Decoder
from nlscale.ops.documents import Documents


class StandIn(nn.Module):
    """Takes the place of a stage in `nlscale.evaluate.loss.validation_loss`; `forward` differs.

    Args:
        stage: of the trainer.
    """

    def __init__(self, stage: Decoder) -> None:
        super().__init__()
        self._stage = [stage]  # in a list: its parameters are not this module's
        # What megatron-core's schedules ask of a stage.
        self.config, self.model_type = stage.config, stage.model_type
        self.set_input_tensor = stage.set_input_tensor

    def forward(self, tokens: Tensor, targets: Tensor, documents: Documents | None) -> Tensor:
        """Of each target, fp32 [sequence, batch]; on an earlier stage its output."""
        raise NotImplementedError
