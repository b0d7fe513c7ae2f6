"""How a model reads a text whose losses are asked for: as it is, or learning from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy

from nlscale.evaluate.finite import finite
from nlscale.generate import learned
from nlscale.generate.model import Model


class Reader(Protocol):
    """Reads rows side by side, piece by piece."""

    def begin(self) -> None:
        """Begin a context."""

    def nats(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """-log p of targets, the tokens after these, float64 [rows, n] on the CPU."""
        ...

    def end(self) -> None:
        """After the last context."""


class Static:
    """By the weights as they were trained."""

    def __init__(self, model: Model, rows: int) -> None:
        self._model, self._rows = model, rows

    def begin(self) -> None:
        self._stream = self._model.stream(self._rows)

    def nats(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = finite(self._stream.feed(tokens))
        nats = cross_entropy(
            logits.flatten(0, 1), targets.to(logits.device).flatten(), reduction="none"
        )
        return nats.view(targets.shape).double().cpu()

    def end(self) -> None:
        pass


class Learning:
    """By weights that levels change on the way; of each token before it is learned from."""

    def __init__(
        self, model: Model, rows: int, overrides: Sequence[str] | None, file: Path | None
    ) -> None:
        """Args: the keys of levels that learn, and where what they have learned is kept."""
        self._model, self._file = model, file
        self._stream = model.learning(rows, overrides or ())
        if file is not None and file.exists():
            learned.load(file, model, self._stream)

    def begin(self) -> None:
        self._stream.begin()

    def nats(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if not self._stream.length:
            self._stream.feed(tokens[:, :1])
        return finite(self._stream.feed(targets)).double().cpu()

    def end(self) -> None:
        if self._file is not None:
            learned.save(self._file, self._model, self._stream)
