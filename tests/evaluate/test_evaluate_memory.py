"""A validation needs no more memory than training does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import world

from nlscale.config import recipe

VOCABULARY = 512
KEYS = [
    "data.dir=none", "data.sequence_length=256", "model.layers=6", "model.d_model=128",
    "model.heads=4", "train.dtype=fp32", "train.micro_batch=8", "train.global_batch=16",
    "train.validation_sequences=96", "parallel.replica_check_every=0",
]  # fmt: skip


class Sequences:
    """Held-out samples, as the shards would give them."""

    shards = SimpleNamespace(separator=0, bytes_per_token=1.0, masked=False)

    def __len__(self) -> int:
        return 96

    def __getitem__(self, number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, VOCABULARY, 257)


def most_memory(validates: bool) -> tuple[int, float | None]:
    """Bytes that this process held at most, and the loss of its validation."""
    from nlscale.evaluate.loss import validation_loss
    from nlscale.levels.spectrum import spectrum
    from nlscale.parallel.devices import peak_memory
    from nlscale.parallel.layout import process_groups
    from nlscale.step.trainer import Trainer

    config = recipe.load(None, KEYS).config
    samples, loss = Sequences(), None
    with process_groups(config) as layout:
        levels = spectrum(config.levels, tokens_per_step=1)
        trainer = Trainer.build(config, layout, levels, VOCABULARY)
        for step in range(2):
            rows = [np.stack([samples[16 * step + 8 * i + j] for j in range(8)]) for i in range(2)]
            trainer.take_step([trainer.to_batch(x, 0, 8) for x in rows])
        if validates:
            loss = validation_loss(trainer, samples).loss  # type: ignore[arg-type]
        return peak_memory(layout.device), loss


def test_a_run_that_validates_holds_no_more_than_one_that_does_not() -> None:
    # Twelve micro batches, of which the graph of one alone is most of what training holds. What an
    # allocator takes besides differs from process to process, by some percent; what validation
    # holds is there every time.
    found = []
    for _ in range(3):
        ((trained, _),) = world.run(1, most_memory, False)
        ((validated, loss),) = world.run(1, most_memory, True)
        assert loss is not None and abs(loss - np.log(VOCABULARY)) < 1
        found.append(validated / trained)
        if found[-1] <= 1.05:
            return
    raise AssertionError(f"validation holds {found} times what training does")
