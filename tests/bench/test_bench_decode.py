"""Decoding a tiny model: what is carried, and whether token by token is what at once is."""

from __future__ import annotations

from typing import Any

import gpu
import pytest
import world
from levels.level_runs import load

from nlscale.bench import decode
from nlscale.bench.decode import bench_decoding
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.generate.model import Stream

MIXERS = ("hope", "gated-delta", "attention")
WIDTH, LAYERS, CHUNK = 16, 2, 4
SIZES = [
    *("model.vocabulary=32", f"model.layers={LAYERS}", f"model.d_model={WIDTH}", "model.heads=2"),
    *(f"model.memory.chunk={CHUNK}", "model.memory.convolution=3", "levels=[1]"),
]


def configs(*overrides: str, mixers: tuple[str, ...] = MIXERS) -> list[Config]:
    return [load([*SIZES, *overrides, f"model.mixer={mixer}"]) for mixer in mixers]


def rows(*overrides: str, **sizes: Any) -> dict[tuple[str, int, int], dict[str, Any]]:
    """By mixer, batch and context."""
    sizes = {"contexts": [5, 13], "new_tokens": 6, "batches": [1, 3], "repeats": 1} | sizes
    found = bench_decoding(configs(*overrides), **sizes)
    assert found["ok"] == all(row["ok"] for row in found["rows"])
    return {(row["mixer"], row["batch"], row["context"]): row for row in found["rows"]}


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, int, int], dict[str, Any]]:
    # of a run on many ranks: the whole model is decoded on one
    return rows("parallel.tensor=2", "parallel.sequence=true")


def test_every_mixer_is_timed_at_every_batch_and_context(found: dict[Any, Any]) -> None:
    assert list(found) == [(m, b, c) for m in MIXERS for b in (1, 3) for c in (5, 13)]
    for (_, batch, context), row in found.items():
        tokens = row["prefill_tokens_per_second"] * row["prefill_seconds"]
        assert tokens == pytest.approx(batch * context)
        assert 0 < row["token_ms"] <= row["token_ms_p95"]
        assert row["tokens_per_second"] * row["token_ms"] == pytest.approx(1e3 * batch)
        assert row["ok"] and 0 < row["difference"] < row["bound"] < 1e-5
        assert row["launch_share"] is row["peak_memory_bytes"] is None


def test_keys_and_values_grow_with_the_context_and_a_memory_does_not(found: dict[Any, Any]) -> None:
    matrix, tail = WIDTH * WIDTH // 2, 2 * 2 * WIDTH  # of both heads; of two inputs
    for (mixer, batch, context), row in found.items():
        carried = {
            "attention": 2 * WIDTH * (context + decode._WARM_UP + 6),
            # what makes k and v, now and at the start of the chunk, and the main memory
            "hope": 3 * matrix + tail,
            "gated-delta": matrix + tail,
        }
        where = 8 * (1 + LAYERS)  # the row is, of its stream and in each layer
        assert row["state_bytes"] == 4 * LAYERS * carried[mixer] + where, (mixer, batch, context)


def test_a_stream_that_forgets_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Stream.feed

    def forgetting(self: Stream, tokens: Any, last: bool = False) -> Any:
        self._states = None
        return feed(self, tokens, last=last)

    few = {"contexts": [13], "batches": [1]}
    assert all(row["ok"] for row in rows("train.dtype=bf16", **few).values())
    monkeypatch.setattr(Stream, "feed", forgetting)
    for dtype in ("bf16", "fp32"):
        assert not any(row["ok"] for row in rows(f"train.dtype={dtype}", **few).values())


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.vocabulary"):
        rows("model.vocabulary=null")
    with pytest.raises(UserError, match="1 or more"):
        rows(contexts=[0])


def on_a_gpu() -> tuple[dict[str, Any], Any]:
    sizes = ["model.layers=1", "model.d_model=128", "model.memory.chunk=16", "train.dtype=bf16"]
    with gpu.stand_in(numbers=True):
        two = configs(*sizes, mixers=("hope", "attention"))
        return bench_decoding(two, [33], 1, [2], 1), gpu.launches


def test_decoding_finds_what_it_asks_a_gpu_for() -> None:
    ((result, launches),) = world.run(1, on_a_gpu)
    assert result["device"] == "stand-in" and len(result["rows"]) == 2
    assert all(row["peak_memory_bytes"] and row["launch_share"] for row in result["rows"])
    assert launches["pi_kernel"] > 0, "a context is read by the kernels"
