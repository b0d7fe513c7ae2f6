"""A model for tests: one process, real process groups, tiny sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from nlscale import recipe
from nlscale.config import CmsForm, Config, Mixer
from nlscale.model.hope import Hope
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

Build = Callable[..., Hope]


def tiny(*overrides: str) -> Config:
    return recipe.load(None, [*TINY, *overrides]).config


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    """Makes initialised models while the process groups of one process exist."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other at these sizes
    with process_groups(tiny()):

        def make(*overrides: str, seed: int = 1234) -> Hope:
            config = tiny(*overrides)
            model = Hope(config, megatron_config(config), VOCABULARY)
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
    for name, choices in (("mixer", Mixer), ("cms", CmsForm)):
        if name in metafunc.fixturenames:
            values = [f"model.{name}={choice.value}" for choice in choices]
            metafunc.parametrize(name, values, ids=[choice.value for choice in choices])
