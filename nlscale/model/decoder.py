"""The whole model, or one pipeline stage of it (docs/concepts/cms.md)."""

from __future__ import annotations

from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.in_context import local_at
from nlscale.config.vocabulary import Config
from nlscale.model.block import Block
from nlscale.model.layers import RMSNorm, embedding, head, vocabulary_group
from nlscale.model.loss import cross_entropy
from nlscale.model.sizes import mlp_hidden, places
from nlscale.model.width import width_multiplier
from nlscale.ops.documents import Documents


class Decoder(nn.Module):
    """Embedding, blocks, norm and head; a stage holds a range of the blocks.

    Parameters are named by their place in the whole model (`blocks.7.cms...` on any stage), and
    `level_and_depth` says which level and depth each belongs to.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        config: Config,
        megatron: TransformerConfig,
        vocabulary: int,
        blocks: range | None = None,
    ) -> None:
        super().__init__()
        model = config.model
        blocks = range(model.layers) if blocks is None else blocks
        hidden = mlp_hidden(config)
        self._places = places(config, vocabulary)
        self.config = megatron  # megatron-core's schedules look here
        self.layers = model.layers
        self.is_first, self.is_last = blocks.start == 0, blocks.stop == model.layers
        self.embedding = embedding(megatron, vocabulary, model.init_std) if self.is_first else None
        train = config.train
        self.blocks = nn.ModuleDict(
            {str(i): Block(model, megatron, hidden, train, i, local_at(config, i)) for i in blocks}
        )
        if self.is_last:
            self.norm = RMSNorm(megatron, model.d_model, model.norm_eps, train.kernels)
            tied = self.embedding if model.tie_embeddings else None
            assert (tied is not None) == model.tie_embeddings, "of one stage that is first and last"
            self.head = head(megatron, vocabulary, model.init_std, tied)
            self.width_multiplier = width_multiplier(model)
            self.z_loss, self.kernels = train.z_loss, train.kernels
        self._input: Tensor | None = None

    def set_input_tensor(self, tensor: Tensor | list[Tensor | None] | None) -> None:
        """Called by the pipeline schedule: what the stage before sent."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor

    def level_and_depth(self, name: str) -> tuple[int, int]:
        """Level and depth of a parameter, by its name."""
        (place,) = (place for place in self._places if place.holds(name))
        return place.level, depth_of(name, self.layers)

    def hidden(
        self,
        tokens: Tensor,
        states: dict[str, Any] | None = None,
        carry: bool = True,
        documents: Documents | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """tokens [batch, sequence] -> residual stream [sequence, batch, d_model], new states.

        `states` are those an earlier piece of the same sequences returned, which may be written to;
        None at their start. `lengths`: how many of its tokens each row reads, int64 [batch], on the
        CPU; None: all.
        Without `carry` no new ones are returned, and what they hold is freed block by block.
        `documents` says where they begin in whole samples, from one to the next of which nothing
        is carried; None: a sample is one.
        """
        assert states is None or documents is None, "documents are whole samples"
        if self.embedding is not None:
            x = self.embedding(tokens)
            # [batch, sequence, d] unless the embedding has already scattered the sequence
            x = x if self.embedding.reduce_scatter_embeddings else x.transpose(0, 1).contiguous()
        else:
            assert self._input is not None, "a later pipeline stage needs the earlier one's output"
            x = self._input
        carried: dict[str, Any] = {}
        update: Tensor | None = None
        for index, block in self.blocks.items():
            state = None if states is None else states[index]
            x, update, state = block(x, update, state, documents, lengths, carry)
            if carry:
                carried[index] = state
        return x if update is None else x + update, carried

    def logits(self, x: Tensor) -> Tensor:
        """Residual stream -> logits [sequence, batch, vocabulary / tensor-parallel size]."""
        normed = self.norm(x)
        if self.width_multiplier != 1.0:
            normed = normed / self.width_multiplier
        if self.head.weight is None:
            assert self.embedding is not None, "the head has no weight of its own"
            return self.head(normed, weight=self.embedding.weight)[0]
        return self.head(normed)[0]

    def forward(
        self, tokens: Tensor, targets: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """Loss of each token in nats, fp32 [sequence, batch]; on an earlier stage its output."""
        x, _ = self.hidden(tokens, carry=False, documents=documents)
        if not self.is_last:
            return x
        targets = targets.transpose(0, 1).contiguous()
        return cross_entropy(self.logits(x), targets, vocabulary_group(), self.z_loss, self.kernels)


def depth_of(name: str, layers: int) -> int:
    """Depth of the block that a parameter counts with, by its name in the whole model."""
    first, _, rest = name.partition(".")
    if first != "blocks":
        return 0 if first == "embedding" else layers - 1
    return int(rest.partition(".")[0])


def named_parameters(stages: list[Decoder]) -> dict[str, nn.Parameter]:
    """The parameters of some stages by their names in the whole model."""
    return {name: p for stage in stages for name, p in stage.named_parameters()}
