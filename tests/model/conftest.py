"""A model for tests: one process, real process groups, tiny sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from nlscale.config import recipe
from nlscale.config.vocabulary import MIXERS, CmsForm, Config
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.parallel.layout import process_groups

VOCABULARY = 61
TINY = [
    "data.dir=none",
    "train.dtype=fp32",
    "model.layers=2",
    "model.d_model=32",
    "model.heads=2",
    "model.hidden=48",
    "model.memory.chunk=4",
]

Build = Callable[..., Decoder]


def tiny(*overrides: str) -> Config:
    return recipe.load(None, [*TINY, *overrides]).config


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    """Makes initialised models while the process groups of one process exist."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other at these sizes
    with process_groups(tiny()):

        def make(*overrides: str, seed: int = 1234) -> Decoder:
            config = tiny(*overrides)
            model = Decoder(config, megatron_config(config), VOCABULARY)
            initialize(model, seed, tensor_rank=0, tensor_size=1)
            return model

        yield make
    torch.set_num_threads(threads)


@pytest.fixture
def tokens() -> torch.Tensor:
    """[batch, sequence], several chunks long and not a whole number of them."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(VOCABULARY, (3, 26), generator=generator)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`mixer` and `cms` run over all of them, as overrides."""
    # A nested model is that of one level, and its copies are no part of it.
    composed = [form for form in CmsForm if form != CmsForm.nested]
    for name, choices in (("mixer", MIXERS), ("cms", composed)):
        if name in metafunc.fixturenames:
            texts = [getattr(choice, "value", choice) for choice in choices]
            metafunc.parametrize(name, [f"model.{name}={text}" for text in texts], ids=texts)
