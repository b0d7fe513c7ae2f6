"""What is known of a mixer without making one. No torch is imported: plans answer at once.

A mixer is a folder: `module.py` computes, `facts.py` counts what that takes, and a line of
`nlscale.model.mixers.table` gives it a name.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from nlscale.config.vocabulary import Config, Dtype, ModelConfig

PASSES = 3
"""Forward, and twice that backward: a product is differentiated by both of its factors."""
FP32 = 4
"""Bytes."""


def element_bytes(config: Config) -> int:
    """Bytes of a parameter or an activation."""
    return 2 if config.train.dtype == Dtype.bf16 else FP32


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch on one tensor-parallel rank."""

    config: Config

    @property
    def rows(self) -> int:
        return self.config.train.micro_batch

    @property
    def tokens(self) -> int:
        return self.rows * self.config.data.sequence_length

    @property
    def own_tokens(self) -> float:
        """Of the residual stream: split along the sequence where `parallel.sequence` is set."""
        parallel = self.config.parallel
        return self.tokens / (parallel.tensor if parallel.sequence else 1)

    @property
    def element(self) -> int:
        """Bytes of a parameter or an activation."""
        return element_bytes(self.config)

    @property
    def width(self) -> int:
        """Channels of the mixer on this rank."""
        return self.config.model.d_model // self.config.parallel.tensor

    @property
    def heads(self) -> int:
        return self.config.model.heads // self.config.parallel.tensor

    @property
    def channels(self) -> int:
        """Bytes of a mixer's channels, once."""
        return self.tokens * self.width * self.element

    @property
    def residual(self) -> float:
        """Bytes of the residual stream, once."""
        return self.own_tokens * self.config.model.d_model * self.element

    @property
    def compiled(self) -> bool:
        """Whether small operations that follow each other are one, which keeps what it begins with
        and nothing between."""
        return self.config.train.kernels

    @property
    def half_kernels(self) -> bool:
        """Whether what kernels for bf16 take runs through them."""
        return self.config.train.kernels and self.config.train.dtype == Dtype.bf16


class MixerFacts(ABC):
    """Of one mixer: what makes it, how large it is, and what it takes."""

    made_by: ClassVar[str]
    """`package.module:Class` of a `nlscale.model.mixers.module.Mixer`, imported when made."""
    core: ClassVar[str]
    """The part of its FLOPs that lies between the projections."""
    reads_attention: ClassVar[bool] = False
    """Whether `model.attention` says something of it."""
    windowed: bool = False
    """Whether that is of its window too."""
    logit_bytes: ClassVar[int] = 0
    """Of logits that the core takes beside queries, keys and values, a token and head."""
    plain_by: ClassVar[str | None] = None
    """`package.module:Class` of a `nlscale.model.plain.PlainMixer`, the same in plain torch, which
    exports to Hugging Face carry; None: there is none, and it cannot be exported there."""

    def module(self) -> Any:
        """The class that computes; importing it imports torch."""
        return _named(self.made_by)

    def plain(self) -> Any:
        """The class in plain torch; importing it imports torch."""
        assert self.plain_by is not None, "an export to Hugging Face is refused before"
        return _named(self.plain_by)

    def plain_options(self, model: ModelConfig) -> dict[str, Any]:
        """What the class in plain torch is made with, by name, beside d_model and norm_eps.

        Text, numbers, truths and lists of these: they are stored in the export's config.json.
        """
        raise NotImplementedError(f"{type(self).__name__} names plain_by without its options")

    def make(self, *given: Any) -> Any:
        """The module itself, of these facts; `Mixer` says what it is given."""
        return self.module()(self, *given)

    def check(self, model: ModelConfig) -> None:  # noqa: B027 (most mixers take any sizes)
        """Refuse sizes that it does not take.

        Raises:
            UserError: one line with the numbers and a fix.
        """

    @abstractmethod
    def parameters(self, model: ModelConfig) -> int:
        """Of one layer, over all tensor-parallel ranks, the norm before it included."""

    def matrices(self, model: ModelConfig) -> dict[tuple[int, int], int]:
        """Of one layer, how many matrices there are of each shape [out, in], over all
        tensor-parallel ranks: what `nlscale.model.init.tag` calls a matrix. A mixer that does not
        say has none for the plan, which then counts all of it as under AdamW."""
        return {}

    def whole(self, model: ModelConfig) -> int:
        """Those of them that every tensor-parallel rank holds all of."""
        return model.d_model

    def shared(self, model: ModelConfig) -> dict[str, int]:
        """Numbers, beside heads, that tensor-parallel ranks share evenly, by what they are."""
        return {}

    @abstractmethod
    def flops(self, config: Config) -> dict[str, float]:
        """FLOPs of a token of one layer, forward and backward, by part of the mixer.

        `projections` are those into and out of it; the other names are its own
        (`nlscale.model.flops` says what is counted).
        """

    def state_bytes(self, config: Config) -> int | None:
        """What one layer carries of a sequence after `data.sequence_length` tokens, at the end of a
        chunk, over all tensor-parallel ranks, without counts; None where the mixer does not say."""
        return None

    def serial_programs(self, batch: MicroBatch) -> int | None:
        """Programs of a kernel that goes through a sequence from its beginning to its end.

        None where there is no such kernel. A GPU runs one on each of its multiprocessors.
        """
        return None

    def advice(self, batch: MicroBatch) -> list[str]:
        """What a plan says of how this mixer runs on GPUs, a sentence each."""
        return []

    @abstractmethod
    def kept(self, batch: MicroBatch, recompute: bool) -> float:
        """Bytes that one layer keeps for the backward pass, from its normalised input on.

        Args:
            batch: on one rank.
            recompute: whether what lies between the projections is computed again.
        """

    @abstractmethod
    def transient(self, batch: MicroBatch, recompute: bool) -> float:
        """Bytes that the backward pass of one layer has at once, beside all that is kept."""


def _named(name: str) -> Any:
    """Imports what `package.module:name` is."""
    module, _, inside = name.partition(":")
    return getattr(importlib.import_module(module), inside)
