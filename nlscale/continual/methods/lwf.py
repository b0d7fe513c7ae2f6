"""Learning without forgetting: on new data the model goes on to say what it said before.

Li & Hoiem 2016: each target has lambda tau^2 KL(old || new) added, of the distributions of the next
token at temperature tau; old are the weights at the end of the task before.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.continual.methods.options import LwfOptions
from nlscale.errors import UserError
from nlscale.evaluate.stand_in import StandIn
from nlscale.model.decoder import Decoder
from nlscale.model.layers import vocabulary_group
from nlscale.model.loss import cross_entropy
from nlscale.ops.documents import Documents
from nlscale.step.swap import stand_in
from nlscale.train.hooks.hook import Hook

OLD = "lwf_weights"
"""Kind of tensors in checkpoints: the old weights."""


class Lwf(Hook):
    """Adds the term to every target once it has been called, such as at boundaries. It costs a
    second forward pass, and the weights once more."""

    Options = LwfOptions

    def begin(self) -> None:
        parallel = self.run.config.parallel
        if parallel.tensor > 1 or parallel.pipeline > 1:
            raise UserError(
                f"lwf compares whole distributions, and the model is split (parallel.tensor "
                f"{parallel.tensor}, parallel.pipeline {parallel.pipeline}); set both to 1"
            )
        self._old: Decoder | None = None
        if OLD in self.run.trainer.kept:
            with stand_in(self.run.trainer, OLD):
                self._distil()

    def on_update(self) -> None:
        """What the model says now is what it is to go on saying."""
        trainer = self.run.trainer
        trainer.kept[OLD] = {s.weights: s.weights.detach().clone() for s in trainer.shards()}
        self._distil()

    def _distil(self) -> None:
        """From the weights that the model has at this moment."""
        trainer, options = self.run.trainer, self.options
        (stage,) = trainer.stages
        if self._old is None:
            vocabulary = self.run.prepared.vocabulary
            self._old = Decoder(self.run.config, stage.config, vocabulary)
            self._old.to(trainer.layout.device).requires_grad_(False)
        with torch.no_grad():
            for mine, other in zip(self._old.parameters(), stage.parameters(), strict=True):
                mine.copy_(other)
        asked = Distilled(stage, self._old, options.strength, options.temperature)
        trainer.asked = [cast(Decoder, asked)]


class Distilled(StandIn):
    """A whole model that adds the term to the loss of each target.

    Args:
        stage: the model that learns.
        old: as it was.
        strength: lambda.
        temperature: tau.
    """

    def __init__(self, stage: Decoder, old: Decoder, strength: float, temperature: float) -> None:
        super().__init__(stage)
        self._old, self._strength, self._temperature = [old], strength, temperature

    def forward(self, tokens: Tensor, targets: Tensor, documents: Documents | None) -> Tensor:
        """Nats of each token, fp32 [sequence, batch]."""
        (stage,), (old,) = self._stage, self._old
        x, _ = stage.hidden(tokens, carry=False, documents=documents)
        logits = stage.logits(x)
        with torch.no_grad():
            y, _ = old.hidden(tokens, carry=False, documents=documents)
            before = old.logits(y)
        apart = divergence(before, logits, self._temperature)
        # what the logits hold is lost in the backward pass of the loss
        own: Any = logits.clone()
        goal = targets.transpose(0, 1).contiguous()
        losses = cross_entropy(own, goal, vocabulary_group(), stage.z_loss, stage.kernels)
        return losses + self._strength * apart


def divergence(old: Tensor, new: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(softmax(old / tau) || softmax(new / tau)), nats, fp32.

    Args:
        old: logits, [..., vocabulary].
        new: the same.
        temperature: tau.

    Returns:
        [...].
    """
    was = F.log_softmax(old.float() / temperature, -1)
    now = F.log_softmax(new.float() / temperature, -1)
    return temperature**2 * (was.exp() * (was - now)).sum(-1)
