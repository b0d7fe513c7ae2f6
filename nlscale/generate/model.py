"""A trained model that reads tokens and says what follows, at once or piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nlscale.checkpoint.export import NO_DATA
from nlscale.config.in_context import learning
from nlscale.config.urls import location_of
from nlscale.config.vocabulary import Config, mixer_label
from nlscale.data.tokenizer import TOKENIZER_NAME, Tokenizer, load_tokenizer
from nlscale.errors import UserError
from nlscale.generate.learning import LearningStream
from nlscale.generate.sampling import Sampling
from nlscale.generate.stream import Stream as Stream
from nlscale.generate.text import TOKENS, Continuation, Prompt, generate
from nlscale.generate.tokens import Tokens, known, shaped
from nlscale.model.decoder import Decoder
from nlscale.parallel.alone import alone


class Model:
    """A trained model on one device. No gradients are kept.

    Attributes:
        config: its `model`, `levels` and `data` sections and `train.dtype` are those of its run;
            what else says how it was trained has its defaults (`nlscale.read(run).config` has all)
        step: optimizer steps that it was trained for
        device, dtype: of its weights
    """

    def __init__(
        self, decoder: Decoder, config: Config, step: int, tokenizer_folder: Path | None = None
    ) -> None:
        self.config, self.step = config, step
        self._tokenizer_folder = tokenizer_folder or location_of(config.data.folders()[0])
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
        """That which lies in an export, else that of the data it was trained on, read from their
        folder; another can be assigned.

        Raises:
            UserError: the folder is not there any more; or the assigned one has more ids than the
                model.
        """
        if self._tokenizer is None:
            call = "model.tokenizer = nlscale.data.tokenizer.load_tokenizer(FOLDER)"
            if self._tokenizer_folder == Path(NO_DATA):
                raise UserError(
                    f"the model has no tokenizer: the folder that it was imported from had no "
                    f"{TOKENIZER_NAME}; assign one: {call}"
                )
            try:
                self.tokenizer = load_tokenizer(self._tokenizer_folder)
            except UserError as error:
                raise UserError(f"{error}, and assign it: {call}") from None
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
        return Stream(self._decoder, self.vocabulary, batch)

    def stream_from(self, tensors: Mapping[str, Tensor]) -> Stream:
        """The stream that `Stream.tensors` returned these of, exactly.

        Raises:
            UserError: they are not of a stream, do not go together, or are of one of another model
                or dtype: shapes and lengths are compared, and not what is in them.
        """
        return Stream.of(self._decoder, self.vocabulary, tensors)

    def learning(
        self,
        batch: int = 1,
        context: Sequence[str] = (),
        tensors: Mapping[str, Tensor] | None = None,
    ) -> LearningStream:
        """Sequences from their start, from which levels of objective `ntp` go on learning.

        The weights of the model stay as they are: what changes belongs to the stream.

        Args:
            batch: sequences, each of which changes weights of its own.
            context: LEVEL.KEY=VALUE, keys of `context` of a level beside those of the model, such
                as ["base.chunk=256", "base.learning_rate=0.1"].
            tensors: of a stream of the same keys and batch (`LearningStream.tensors`), to go on
                from it.

        Raises:
            UserError: keys or tensors that do not fit the model; no level learns.
        """
        levels = learning(self.config, context)
        stream = LearningStream(self._decoder, self.vocabulary, batch, levels)
        if tensors is not None:
            stream.restore(tensors)
        return stream

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
        return known(shaped(tokens), self.vocabulary).to(self.device)

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self._decoder.parameters())
        mixer = mixer_label(self.config.model)
        return (
            f"<nlscale model: {mixer}, {parameters / 1e6:.2f}M parameters, step "
            f"{self.step}, {str(self.dtype).removeprefix('torch.')} on {self.device}>"
        )

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        tokens: int = TOKENS,
        samples: int = 1,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        **sampling: Any,
    ) -> list[Continuation]:
        """Let it go on with texts; `nlscale.generate.text.Generation` gives them as they come.

        Args:
            prompts: one text, or several, each a text or token ids; an empty one stands for the
                beginning of a document.
            tokens: to generate of each at most.
            samples: of each prompt. Sample i of a seed is the same whatever is generated beside it,
                up to draws that the rounding of logits decides.
            stop: texts at the first of which one ends, without it.
            seed: of the draws, 0 to 2^64 - 1.
            sampling: of `nlscale.generate.sampling.Sampling`: temperature, top_k, top_p, min_p,
                repetition_penalty.

        Returns:
            The samples of the first prompt, then those of the second, and so on.

        Raises:
            UserError: an argument out of its range; a text that the tokenizer does not know, or ids
                beyond the vocabulary; as `tokenizer`; or logits are not finite.
        """
        return generate(self, prompts, tokens, samples, Sampling(**sampling), stop, seed)
