"""Sizes computed from the configuration are those of the built model."""

from __future__ import annotations

import itertools

import pytest

from nlscale.config import recipe
from nlscale.config.vocabulary import MIXERS, Config
from nlscale.errors import UserError
from nlscale.model.mixers.table import mixer as mixer_of
from nlscale.model.sizes import level_hidden, level_parameters, non_embedding_parameters

PARTS = (
    "[{parts: [head]},{period: 4, parts: [cms, mixer]},"
    "{period: 8, parts: [cms, norms]},{period: 9, parts: [embedding]}]"
)
SPECTRA = ["[1]", "[1,4,16]", "[1,{period: 4, hidden: 40},8,64]", "[{hidden: 24},{hidden: 8}]"]
SPECTRA.append(PARTS)


def config_of(*overrides: str) -> Config:
    return recipe.load(None, ["data.dir=none", *overrides]).config


def counted(model, levels: int) -> list[int]:
    counts = [0] * levels
    for name, parameter in model.named_parameters():
        counts[model.level_and_depth(name)[0]] += parameter.numel()
    return counts


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_parameters_a_level_are_counted_right(build, mixer, cms, spectrum: str) -> None:
    sizes = ["model.d_model=48", "model.heads=3", "model.layers=3"]
    # where every level has its own width, theirs is the sum
    sizes.append("model.hidden=32" if spectrum.count("hidden") == 2 else "model.hidden=80")
    choice = [mixer, cms, f"levels={spectrum}", *sizes]
    config, model = config_of(*choice), build(*choice)
    vocabulary = model.embedding.weight.shape[0]
    expected = level_parameters(config, vocabulary)
    assert counted(model, len(config.levels.spectrum)) == expected
    assert sum(p.numel() for p in model.parameters()) == sum(expected)
    looked_up = model.embedding.weight.numel()
    assert non_embedding_parameters(config, vocabulary) == sum(expected) - looked_up


@pytest.mark.parametrize(
    "memory",
    [
        "{separate_inputs: false, output_gate: false}",
        "{static_gates: false, read_norm: false, convolution: 7}",
    ],
)
def test_parameters_are_counted_right_whatever_the_memory(build, mixer, memory: str) -> None:
    choice = [mixer, f"model.memory={memory}", "model.d_model=32", "model.heads=2"]
    block = build(*choice).blocks["0"]
    count = sum(p.numel() for part in (block.norm, block.mixer) for p in part.parameters())
    sizes = config_of(*choice).model
    assert mixer_of(sizes.mixer).parameters(sizes) == count


@pytest.mark.parametrize("spectrum", ["[1]", "[1,4,16]", "[1,4,16,64]"])
@pytest.mark.parametrize(("width", "heads"), [(256, 4), (512, 8), (768, 12), (2048, 16)])
def test_mixers_compare_at_equal_parameters(width: int, heads: int, spectrum: str) -> None:
    totals = {}
    for mixer in MIXERS:
        config = config_of(
            f"model.mixer={mixer}",
            f"model.d_model={width}",
            f"model.heads={heads}",
            f"levels={spectrum}",
        )
        totals[mixer] = sum(level_parameters(config, vocabulary=256))
    transformer = config_of("model.mixer=attention", f"model.d_model={width}", "levels=[1]")
    budget = transformer.model.layers * 12 * width**2 + 2 * 256 * width
    assert max(totals.values()) < 1.02 * min(totals.values())
    assert all(total == pytest.approx(budget, rel=0.02) for total in totals.values())


def test_levels_share_the_hidden_units() -> None:
    assert level_hidden(config_of("model.hidden=96", "levels=[1,4,16]")) == [32, 32, 32]
    given = "levels=[{hidden: 48},{period: 4},{period: 16}]"
    assert level_hidden(config_of("model.hidden=96", given)) == [48, 24, 24]
    # a Transformer's: 8 d^2 of feed-forward with three matrices
    transformer = config_of("model.mixer=attention", "model.d_model=768", "model.heads=12")
    assert level_hidden(transformer) == [2048]
    assert level_hidden(config_of("model.hidden=96", f"levels={PARTS}")) == [0, 48, 48, 0]


def test_no_room_for_a_level_is_an_error_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"^model\.hidden: 96 units leave 0 for the levels"):
        level_hidden(config_of("model.hidden=96", "levels=[{hidden: 100},{period: 4}]"))
    with pytest.raises(UserError, match="is not the sum of the levels' own, 32"):
        level_hidden(config_of("model.hidden=80", "levels=[{hidden: 24},{hidden: 8}]"))
    with pytest.raises(UserError, match="use fewer levels"):
        level_hidden(config_of("model.hidden=8", "levels=[1,2,4]"))


def test_each_parameter_has_the_level_and_depth_of_its_place(build, cms) -> None:
    model = build(cms, "levels=[1,4,16]", "model.layers=3")
    of = model.level_and_depth
    assert of("embedding.weight") == (0, 0)
    assert of("head.weight") == of("norm.weight") == (0, 2)
    for depth, level in itertools.product(range(3), range(3)):
        block = f"blocks.{depth}"
        assert of(f"{block}.mixer.project.weight") == (0, depth)
        assert of(f"{block}.norm.weight") == (0, depth)
        assert of(f"{block}.cms.mlps.{level}.up.weight") == (level, depth)
        assert of(f"{block}.cms.mlps.{level}.down.weight") == (level, depth)
        if "sequential" in cms:
            assert of(f"{block}.cms.norms.{level}.weight") == (level, depth)
        else:
            assert of(f"{block}.cms.norms.0.weight") == of(f"{block}.cms.mixture") == (0, depth)


def test_or_of_the_level_whose_part_it_is(build, cms) -> None:
    model = build(cms, f"levels={PARTS}", "model.layers=3")
    of = {name: model.level_and_depth(name) for name, _ in model.named_parameters()}
    assert of.pop("embedding.weight") == (3, 0)
    assert of.pop("head.weight") == (0, 2)
    assert of.pop("norm.weight") == (2, 2)
    for depth in range(3):
        block = f"blocks.{depth}"
        for name in ["norm.weight", "cms.norms.0.weight"]:
            assert of.pop(f"{block}.{name}") == (2, depth)
        for mlp, level in enumerate([1, 2]):
            assert of.pop(f"{block}.cms.mlps.{mlp}.up.weight") == (level, depth)
            assert of.pop(f"{block}.cms.mlps.{mlp}.down.weight") == (level, depth)
        if "sequential" in cms:
            assert of.pop(f"{block}.cms.norms.1.weight") == (2, depth)
        else:  # of the first level that has an MLP
            assert of.pop(f"{block}.cms.mixture") == (1, depth)
    assert all(".mixer." in name and place[0] == 1 for name, place in of.items())
