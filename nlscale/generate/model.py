"""A trained model that reads tokens and says what follows, at once or piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlscale.config.vocabulary import Config
from nlscale.data.tokenizer import Tokenizer, load_tokenizer
from nlscale.errors import UserError
from nlscale.model.decoder import Decoder
from nlscale.parallel.alone import alone

Tokens = Tensor | NDArray[Any] | Sequence[Sequence[int]]
"""Token ids [batch, n], integers of any width."""


class Model:
    """A trained model on one device. No gradients are kept.

    Attributes:
        config: its `model`, `levels` and `data` sections and `train.dtype` are those of its run;
            what else says how it was trained has its defaults (`nlscale.read(run).config` has all)
        step: optimizer steps that it was trained for
        device, dtype: of its weights
    """

    def __init__(self, decoder: Decoder, config: Config, step: int) -> None:
        self.config, self.step = config, step
        weight = next(decoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._decoder = decoder
        self._tokenizer: Tokenizer | None = None

    @property
    def vocabulary(self) -> int:
        """Token ids that it knows: 0 to `vocabulary` - 1."""
        assert self.config.model.vocabulary is not None
        return self.config.model.vocabulary

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the data it was trained on, read from their folder; another can be assigned.

        Raises:
            UserError: the folder is not there any more; or the assigned one has more ids than the
                model.
        """
        if self._tokenizer is None:
            try:
                self.tokenizer = load_tokenizer(self.config.data.dir)
            except UserError as error:
                raise UserError(
                    f"{error}, and assign it: model.tokenizer = "
                    f"nlscale.data.tokenizer.load_tokenizer(FOLDER)"
                ) from None
            assert self._tokenizer is not None
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        if tokenizer.vocabulary > self.vocabulary:
            raise UserError(
                f"the tokenizer {tokenizer.name} has {tokenizer.vocabulary} ids and the model "
                f"knows {self.vocabulary}; load the one that it was trained with"
            )
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Tensor:
        """The token ids of a text, int64 [1, n]; raises as `tokenizer`."""
        return torch.from_numpy(self.tokenizer.encode(text).astype(np.int64))[None]

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of the token ids of one sequence, [n] or [1, n]; raises as `tokenizer`."""
        return self.tokenizer.decode(torch.as_tensor(tokens).cpu().numpy())

    def stream(self, batch: int = 1) -> Stream:
        """Sequences from their start, to be fed piece by piece."""
        return Stream(self, batch)

    def logits(self, tokens: Tokens) -> Tensor:
        """What follows each token of whole sequences.

        Args:
            tokens: [batch, n].

        Returns:
            Logits [batch, n, vocabulary] on `device`, fp32, or float64 where `dtype` is that;
            those at token i are of token i + 1.

        Raises:
            UserError: tokens of another shape or type, or beyond the vocabulary.
        """
        tokens = self._checked(tokens)
        return self.stream(len(tokens)).feed(tokens)

    def loss(self, tokens: Tokens) -> float:
        """Mean over all tokens but each row's first of -log p(token | those before it), in nats.

        Args:
            tokens: [batch, n], n at least 2.

        Raises:
            UserError: as `logits`.
        """
        tokens = self._checked(tokens)
        if tokens.shape[1] < 2:
            raise UserError("a loss needs 2 tokens a row: the first has nothing to follow from")
        with alone(), torch.no_grad():
            return float(self._decoder(tokens[:, :-1], tokens[:, 1:]).mean())

    def _checked(self, tokens: Tokens) -> Tensor:
        """Ids on the device, int64, that the embedding has rows for."""
        if not isinstance(tokens, Tensor):
            array = np.array(tokens)  # a copy: some arrays are read-only, which torch warns of
            if array.dtype.kind not in "iu":
                raise UserError(f"tokens of type {array.dtype} are no ids; give integers")
            tokens = torch.from_numpy(array.astype(np.int64))
        if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
            raise UserError(f"tokens of type {tokens.dtype} are no ids; give integers")
        if tokens.dim() != 2 or not tokens.numel():
            raise UserError(
                f"tokens of shape {tuple(tokens.shape)}; give [batch, n] with n at least 1, such "
                f"as [ids] for one sequence"
            )
        tokens = tokens.long()
        least, most = (int(x) for x in tokens.aminmax())
        if least < 0 or most >= self.vocabulary:
            raise UserError(
                f"token ids run from {least} to {most}, and the model knows 0 to "
                f"{self.vocabulary - 1}"
            )
        return tokens.to(self.device)

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self._decoder.parameters())
        return (
            f"<nlscale model: {self.config.model.mixer}, {parameters / 1e6:.2f}M parameters, step "
            f"{self.step}, {str(self.dtype).removeprefix('torch.')} on {self.device}>"
        )


class Stream:
    """Sequences that a model reads piece by piece; `Model.stream` begins one.

    Between pieces it holds the state of each block's mixer: memories, also those of a chunk that
    is not over, and the last inputs of the convolution; keys and values of attention. A piece may
    end anywhere: feeding in pieces gives what feeding at once gives, up to the rounding of sums in
    another order.
    """

    def __init__(self, model: Model, batch: int) -> None:
        if batch < 1:
            raise UserError(f"a stream of {batch} sequences; give batch=1 or more")
        self.model, self.batch = model, batch
        self._states: dict[str, Any] | None = None

    def feed(self, tokens: Tokens) -> Tensor:
        """Read on.

        Args:
            tokens: the next of every sequence, [batch, n], n at least 1.

        Returns:
            As `Model.logits`, of this piece.

        Raises:
            UserError: as `Model.logits`, or another batch than the stream's.
        """
        tokens = self.model._checked(tokens)
        if len(tokens) != self.batch:
            raise UserError(
                f"{len(tokens)} sequences are fed to a stream of {self.batch}; begin it with "
                f"model.stream(batch={len(tokens)})"
            )
        decoder = self.model._decoder
        with alone(), torch.no_grad():
            x, self._states = decoder.hidden(tokens, self._states)
            logits = decoder.logits(x).transpose(0, 1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()

    def clone(self) -> Stream:
        """Another stream that goes on from here, and leaves this one where it is."""
        other = Stream(self.model, self.batch)
        other._states = None if self._states is None else dict(self._states)
        return other
