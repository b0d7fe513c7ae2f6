"""FLOPs by count against what a profiler counts in a real forward and backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import world

from nlscale.config import recipe
from nlscale.config.vocabulary import MIXERS, Config
from nlscale.model.flops import flops_by_part, flops_per_token, in_context_flops

VOCABULARY = 96
SHAPES = {
    "one level": ["levels=[1]", "model.memory.chunk=16"],
    "levels in turn": ["levels=[1,4]", "data.sequence_length=64", "model.memory.chunk=32"],
    "levels mixed": ["levels=[1,4,16]", "model.cms=independent", "model.layers=3"],
    "a rest of a chunk": ["data.sequence_length=75", "model.memory.chunk=16"],
    "one short chunk": ["data.sequence_length=20", "model.memory.chunk=64"],
    "many heads": ["model.heads=8", "model.memory.chunk=8", "model.memory.convolution=7"],
}


def make(*overrides: str) -> Config:
    return recipe.load(
        None,
        [
            "data.dir=none",
            "data.sequence_length=96",
            "train.dtype=fp32",
            "train.micro_batch=2",
            "model.layers=2",
            "model.d_model=64",
            "model.heads=2",
            *overrides,
        ],
    ).config


def profiled(configs: list[Config]) -> list[float]:
    """FLOPs of a training token as torch counts them, softmax attention as plain products."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from nlscale.model.decoder import Decoder
    from nlscale.model.init import initialize
    from nlscale.model.layers import megatron_config
    from nlscale.parallel.layout import process_groups

    def added_product(_: Any, a: Any, b: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * a[2] * b[2]

    def triangular(a: Any, b: Any, **_: Any) -> int:
        return b[0] * b[1] * b[1] * b[2]  # n^2 a column of the right side

    uncounted = {
        torch.ops.aten.baddbmm_: added_product,
        torch.ops.aten.linalg_solve_triangular: triangular,
    }
    found = []
    with process_groups(configs[0]) as layout:
        for config in configs:
            model = Decoder(config, megatron_config(config), VOCABULARY)
            initialize(model, 1, layout.tensor_rank, layout.tensor_size)
            shape = (config.train.micro_batch, config.data.sequence_length)
            tokens = torch.randint(VOCABULARY, shape)
            with (
                FlopCounterMode(display=False, custom_mapping=uncounted) as counter,
                sdpa_kernel(SDPBackend.MATH),
            ):
                model(tokens, tokens).sum().backward()
            found.append(counter.get_total_flops() / tokens.numel())
    return found


def in_products(config: Config) -> float:
    """What is planned, but the convolutions, and with the whole square of softmax attention."""
    parts = flops_by_part(config, VOCABULARY)
    length = config.data.sequence_length
    whole = parts.get("attention", 0.0) * (2 * length / (length + 1) - 1)
    return sum(parts.values()) + whole - parts.get("convolution", 0.0)


def test_a_training_token_costs_what_a_profiler_counts() -> None:
    shapes = [[f"model.mixer={mixer}", *s] for mixer in MIXERS for s in SHAPES.values()]
    grouped = "model.attention={kv_heads: 1, head_dim: 16, qk_norm: true}"
    shapes.append(["model.mixer=attention", grouped, "model.tie_embeddings=true"])
    configs = [make(*shape) for shape in shapes]
    twice = [make(f"model.mixer={mixer}", "train.recompute=[mixer,cms]") for mixer in MIXERS]
    real = world.run(1, profiled, [*configs, *twice])[0]
    for config, flops in zip(configs, real[: len(configs)], strict=True):
        assert in_products(config) == pytest.approx(flops, rel=1e-9), config
        # what is not a matrix product is little
        in_all = flops_per_token(config, VOCABULARY)
        assert in_all - in_products(config) < 0.02 * in_all
    # the profiler counts what is recomputed; model FLOPs do not
    for config, flops in zip(twice, real[len(configs) :], strict=True):
        once = make(f"model.mixer={config.model.mixer}")
        assert flops_per_token(config, VOCABULARY) == flops_per_token(once, VOCABULARY)
        assert flops > 1.05 * in_products(config)


def test_a_change_inside_the_context_costs_its_products_and_one_sum_made_again() -> None:
    levels = (
        "levels=[{context: {chunk: 24, blocks: 1}},{period: 4, context: {chunk: 32, blocks: 2}}]"
    )
    changing = make(levels, "data.sequence_length=75", "model.hidden=48")
    static = make("levels=[1,4]", "data.sequence_length=75", "model.hidden=48")
    real, without = world.run(1, profiled, [changing, static])[0]
    planned = in_context_flops(changing)
    # 24 hidden units a level, 4 chunks of 24 in one block and 3 of 32 in two; the sums of those
    # that are read are made again in the backward pass
    again = 2 * 64 * 24 * (3 * 24 + 2 * (2 * 32)) / 75
    convolution = 3 * 3 * 2 * 4 * 64
    assert real - without == pytest.approx(planned - convolution + again, rel=1e-9)
    assert planned == pytest.approx(
        flops_per_token(changing, VOCABULARY) - flops_per_token(static, VOCABULARY)
    )


@pytest.mark.parametrize(("kind", "inputs"), [("hope", 2), ("hope-paper", 1)])
def test_a_convolution_costs_three_of_its_forward_passes(kind: str, inputs: int) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = make(f"model.mixer={kind}", "model.memory.convolution=5")
    channels, length = 64 * inputs, 96
    with FlopCounterMode(display=False) as counter:
        torch.conv1d(
            torch.zeros(1, channels, length + 4), torch.zeros(channels, 1, 5), groups=channels
        )
    forward = config.model.layers * counter.get_total_flops() / length
    assert flops_by_part(config, VOCABULARY)["convolution"] == 3 * forward


def test_a_causal_query_reads_half_the_keys_and_the_one_it_stands_at() -> None:
    config = make("model.mixer=attention", "data.sequence_length=4")
    pairs = sum(position + 1 for position in range(4))
    # forward a score and a value, 2 FLOPs a channel each; thrice with the backward pass
    each = 3 * 2 * 2 * config.model.d_model * config.model.layers
    assert flops_by_part(config, VOCABULARY)["attention"] == each * pairs / 4


def test_a_transformer_costs_six_flops_a_parameter_beside_its_attention() -> None:
    """The rule of thumb C = 6 N D, for N without the embedding and the norms."""
    config = make("model.mixer=attention", "model.hidden=176", "levels=[1]")
    parts = flops_by_part(config, VOCABULARY)
    matrices = 2 * (4 * 64**2 + 3 * 64 * 176) + 64 * VOCABULARY
    assert sum(parts.values()) - parts["attention"] == 6 * matrices
