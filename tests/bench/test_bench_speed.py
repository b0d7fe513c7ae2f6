"""`nlscale bench scan|layer|optimizer|tiers|step|train` on a CPU, tiny; speed is not tested."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops.plain_ops import PlainAsyncIo
from torch.autograd import DeviceType

from nlscale import cli
from nlscale.bench.tiers import print_tiers
from nlscale.bench.trace import STEPS, largest_costs
from nlscale.bench.train import PLAIN
from nlscale.bench.transformer import Transformer
from nlscale.bench.updates import print_optimizer
from nlscale.config import recipe
from nlscale.model.decoder import Decoder
from nlscale.model.flops import flops_by_part, flops_per_token
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.model.sizes import level_parameters
from nlscale.ops import check, compiled
from nlscale.ops.memory.scan import memory_scan
from nlscale.parallel.layout import process_groups

TINY = """
data: {dir: none, sequence_length: 16}
model: {layers: 2, d_model: 32, heads: 2, memory: {chunk: 8}}
train: {global_batch: 4, micro_batch: 2, dtype: fp32}
"""
VOCABULARY = "model.vocabulary=32"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


def flops_of_scan(mixer: str, length: int, heads: int, d: int, chunk: int) -> float:
    overrides = [
        *("data.dir=none", f"data.sequence_length={length}", f"model.mixer={mixer}"),
        *("model.layers=1", f"model.d_model={heads * d}", f"model.heads={heads}"),
        f"model.memory.chunk={chunk}",
    ]
    parts = flops_by_part(recipe.load(None, overrides).config, 1)
    return parts.get("memory", 0) + parts.get("attention", 0)


def bench(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *map(str, arguments)])
    return ended.value.code, *capsys.readouterr()


def test_scan_times_each_mixer_against_floors(capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--sizes", "2x48x3x16", "--chunk", 16, "--repeats", 1)
    code, out, _ = bench(capsys, "scan", *size, "--json")
    found = json.loads(out)
    assert code == 0
    paths = {row["mixer"]: row["path"] for row in found["rows"]}
    torch_form = dict.fromkeys(("hope", "gated-delta", "hope-pure"), "torch")
    assert paths == {**torch_form, "attention": "sdpa"}
    for row in found["rows"]:
        assert row["forward_ms"] > 0 and row["backward_ms"] > 0
        flops = 2 * 48 * flops_of_scan(row["mixer"], 48, 3, 16, 16)
        seconds = (row["flops_forward_ms"] + row["flops_backward_ms"]) / 1e3
        assert seconds * found["matmul_flops_per_second"] == pytest.approx(flops)
        gates = 0 if row["mixer"] == "attention" else 2 * 48 * 3 * 4
        seconds = row["bytes_forward_ms"] / 1e3
        moved = 4 * (2 * 48 * 3 * 16 * 4) + 2 * gates
        assert seconds * found["copy_bytes_per_second"] == pytest.approx(moved)
    code, out, _ = bench(capsys, "scan", *size, "--mixers", "hope")
    assert code == 0 and "2x48x3x16" in out and max(map(len, out.splitlines())) <= 100


def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = bench(capsys, "scan", "--sizes", "8x4096")
    assert code == 2 and err.count("\n") == 1 and "8x4096x16x64" in err


def test_check_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = bench(capsys, "scan", "--check")
    found = json.loads(out)
    assert code == 0 and found["ok"]
    assert {row["kernel"] for row in found["rows"]} == {"hope", "gated-delta", "hope-pure"}
    assert {row["case"] for row in found["rows"]} == {"short", "one token", "documents"}
    assert {row["dtype"] for row in found["rows"]} == {"bfloat16", "float32"}
    assert all(0 < row["error"] < row["bound"] for row in found["rows"])


class WrongGradient(torch.autograd.Function):
    """The same value; one number of its derivative is wrong."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d_x: torch.Tensor) -> torch.Tensor:
        return d_x.index_fill(2, torch.tensor([min(7, d_x.shape[2] - 1)]), 0.0)


def test_check_finds_one_wrong_token_of_a_gradient(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(a: torch.Tensor, b: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return memory_scan(a, WrongGradient.apply(b), *rest, **more)

    monkeypatch.setattr(check, "memory_scan", wrong)
    code, out, err = bench(capsys, "scan", "--check")
    assert code == 2 and not json.loads(out)["ok"]
    said = err.splitlines()[-1]
    assert "9 of 12 checks failed" in said and "b is off" in said


def test_layer_times_blocks_and_mixers(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = bench(capsys, "layer", recipe_file, "--repeats", 1, "--json")
    found = json.loads(out)
    assert code == 0 and found["tokens"] == 32
    assert [row["mixer"] for row in found["rows"]] == ["hope", "gated-delta", "attention"]
    for row in found["rows"]:
        assert row["forward_ms"] > 0 and row["mixer_backward_ms"] > 0
        own = recipe.load(recipe_file, [f"model.mixer={row['mixer']}"]).config
        parts = flops_by_part(own, 0)
        a_token = row["flops_per_second"] / row["tokens_per_second"]
        assert a_token == pytest.approx(sum(parts.values()) / 2)  # two layers
        assert row["mfu"] * found["matmul_flops_per_second"] == pytest.approx(
            row["flops_per_second"]
        )


def test_tiers_compares_steps_bytes_and_what_lies_where(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ring = 0.0625
    levels = "levels=[1,{period: 2, optimizer: {rule: sgd}}]"
    keys = (VOCABULARY, levels, "train.dtype=bf16", f"tiers.ring_mib={ring}", "--cycles", 1)
    code, out, _ = bench(capsys, "tiers", recipe_file, *keys, "--json")
    found = json.loads(out)
    assert code == 0 and found["levels"] == ["level1"] and found["cycle_steps"] == 2
    assert found["same_losses"] is True
    assert found["ratios"] == [found["ratio"]]
    seconds = [found["hbm_step_seconds"], found["host_step_seconds"]]
    assert found["ratio"] == pytest.approx(seconds[1] / seconds[0])
    config = recipe.load(str(recipe_file), [VOCABULARY, levels]).config
    fast, slow = level_parameters(config, 32)
    # fp32 weights and one momentum, twice over the bus in two steps, a depth each
    assert found["streamed_bytes_per_step"] == 2 * 8 * slow / 2
    assert found["streamed_peak_bytes"] == 2 * 8 * slow / 2
    assert found["planned_streamed_bytes_per_step"] == found["streamed_bytes_per_step"]
    assert found["planned_streamed_peak_bytes"] == found["streamed_peak_bytes"]
    assert found["state_bytes_hbm"] == 12 * fast + 8 * slow
    assert found["state_bytes_host"] == pytest.approx(12 * fast + ring * 2**20, abs=12)
    assert found["planned_saved_bytes"] == pytest.approx(found["saved_bytes"], abs=12)
    print_tiers({**found, "same_losses": False})
    told = capsys.readouterr().out
    assert "NOT the same" in told and max(map(len, told.splitlines())) <= 100
    assert "1 cycle of 2 steps" in told


def test_tiers_takes_a_drive(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(compiled, "load", lambda name: PlainAsyncIo)
    monkeypatch.setattr(compiled, "check", lambda name: {})
    keys = (VOCABULARY, "levels=[1,2]", "tiers.ring_mib=0.0625", f"tiers.folder={tmp_path}")
    given = ("tiers", recipe_file, *keys, "--cycles", 2, "--memory", "nvme")
    code, out, _ = bench(capsys, *given, "--json")
    found = json.loads(out)
    assert code == 0 and found["memory"] == "nvme" and found["same_losses"] is True
    assert found["nvme_step_seconds"] > 0
    assert found["streamed_ratio"] == pytest.approx(1)
    assert found["saved_bytes"] == pytest.approx(found["planned_saved_bytes"], abs=12)
    # headers, and what is under way at both ends of what is timed
    assert found["drive_bytes_per_step"] == pytest.approx(
        found["planned_drive_bytes_per_step"], rel=0.6
    )
    print_tiers(found)
    assert "on nvme: level1" in capsys.readouterr().out
    code, _, err = bench(
        capsys, "tiers", recipe_file, VOCABULARY, "levels=[1,2]", "--memory", "nvme"
    )
    assert code == 2 and "set tiers.folder" in err.splitlines()[-1]


def test_tiers_needs_a_level_that_can_be_streamed(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = bench(capsys, "tiers", recipe_file, VOCABULARY, "levels=[1]")
    assert code == 2 and "has none whose state can be streamed" in err.splitlines()[-1]
    code, _, err = bench(capsys, "tiers", recipe_file, "levels=[1,2]")
    assert code == 2 and "model.vocabulary=256" in err.splitlines()[-1]


def test_optimizer_times_each_rule_in_turn_with_adamw(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("muon", "m3", "sgd")
    levels = "levels=[1,{period: 2, optimizer: {rule: sgd, weight_decay: 0}}]"
    keys = ("model.layers=1", "optimizer.m3.every=2", "--repeats", 1, "--json", "--rules")
    code, out, _ = bench(capsys, "optimizer", recipe_file, VOCABULARY, levels, *keys, *wanted)
    found = json.loads(out)
    assert code == 0 and found["beside"] == "adamw"
    rows = {row["rule"]: row for row in found["rows"]}
    assert tuple(rows) == wanted
    for row in rows.values():
        assert row["update_seconds"] > 0 < row["beside_seconds"]
        assert row["ratio"] == row["update_seconds"] / row["beside_seconds"]
    assert rows["sgd"]["state_bytes"] == 4 * found["parameters"]  # also of the level's own muon
    assert rows["m3"]["newton_schulz_flops"] == 1.5 * rows["muon"]["newton_schulz_flops"] > 0
    print_optimizer(found)
    out = capsys.readouterr().out
    assert "of adamw's" in out and all(rule in out for rule in rows)
    code, _, err = bench(capsys, "optimizer", recipe_file, "--rules", "muon")
    assert code == 2 and "model.vocabulary=256" in err
    code, _, err = bench(capsys, "optimizer", "--rules", "nun")
    assert code == 2 and err.count("\n") == 1 and "nun" in err


def test_train_compares_mixers_and_traces(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traced = tmp_path / "trace.json"
    arguments = ("train", recipe_file, VOCABULARY, "levels=[1]", "--steps", 2)
    code, out, _ = bench(capsys, *arguments, "--trace", traced, "--json")
    found = json.loads(out)
    rows = {row["mixer"]: row for row in found["rows"]}
    assert code == 0 and list(rows) == ["hope", "gated-delta", "attention", PLAIN]
    assert rows["attention"]["ratio"] == 1.0 and rows["hope"]["ratio"] > 0
    assert rows["attention"]["parameters"] == rows[PLAIN]["parameters"]
    for name, row in rows.items():
        mixer = "attention" if name == PLAIN else name
        own = recipe.load(recipe_file, [f"model.mixer={mixer}", "levels=[1]"]).config
        assert row["flops_per_token"] == flops_per_token(own, 32)
        flops = row["mfu"] * found["matmul_flops_per_second"]
        assert flops == pytest.approx(row["tokens_per_second"] * row["flops_per_token"])
    costs = found["largest_costs"]
    assert len(costs) == 5 and 0 < sum(cost["share"] for cost in costs) <= 1
    assert costs == sorted(costs, key=lambda cost: -cost["milliseconds"])
    names = {event["name"] for event in json.loads(traced.read_text())["traceEvents"]}
    assert {cost["name"] for cost in costs} <= names
    code, out, _ = bench(capsys, *arguments, "--mixers", "gated-delta", "--trace", traced)
    assert code == 0 and "largest costs of gated-delta" in out and str(traced) in out


def test_on_a_gpu_costs_are_those_of_kernels_each_once() -> None:
    def event(name: str, device: DeviceType, microseconds: float, region: bool = False) -> Any:
        return SimpleNamespace(
            key=name, device_type=device, self_device_time_total=microseconds, count=2 * STEPS,
            self_cpu_time_total=1.0, is_user_annotation=region,
        )  # fmt: skip

    events = [
        event("aten::mm", DeviceType.CPU, 3000),  # of the kernel that it launched
        event("gemm", DeviceType.CUDA, 3000),
        event("pi_kernel", DeviceType.CUDA, 1000),
        event("ProfilerStep", DeviceType.CUDA, 4000, region=True),
    ]
    assert largest_costs(events, on_gpu=True) == [
        {"name": "gemm", "milliseconds": 3 / STEPS, "calls": 2, "share": 0.75},
        {"name": "pi_kernel", "milliseconds": 1 / STEPS, "calls": 2, "share": 0.25},
    ]


def test_progress_says_what_is_begun_and_how_long_the_rest_may_take(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("layer", recipe_file, "--repeats", 1, "--mixers", "hope", "attention")
    code, out, err = bench(capsys, *sizes)
    assert code == 0 and "hope" in out and "attention" in out and "gated-delta" not in out
    begun, next_one = [line for line in err.splitlines() if line.startswith("nlscale bench")]
    assert begun == "nlscale bench layer: 1 of 2, hope"
    assert re.fullmatch(r"nlscale bench layer: 2 of 2, attention, about \d+ s left", next_one)


def test_train_says_what_it_lacks(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = bench(capsys, "train", recipe_file)
    assert code == 2 and err.count("\n") == 1 and "model.vocabulary" in err
    code, _, err = bench(capsys, "train", recipe_file, VOCABULARY, "--trace", "nowhere/trace.json")
    assert code == 2 and err.count("\n") == 1 and "nowhere" in err


def test_step_wants_one(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = bench(capsys, "step", recipe_file, VOCABULARY, "--steps", 0)
    assert code == 2 and err == "nlscale: --steps 0 is less than 1\n"


def test_step_times_a_recipe(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = bench(capsys, "step", recipe_file, VOCABULARY, "--steps", 2)
    found = json.loads(out)
    assert code == 0 and found["tokens_per_step"] == 64 and found["ranks"] == 1
    assert 0 < found["fastest_step_seconds"] <= found["median_step_seconds"]


def test_the_plain_transformer_is_the_same_model(recipe_file: Path) -> None:
    config = recipe.load(recipe_file, ["model.mixer=attention", "levels=[1]"]).config
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(32, (3, 17), generator=generator)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    plain = Transformer(config, 32)
    with process_groups(config):
        model = Decoder(config, megatron_config(config), 32)
        initialize(model, 1, 0, 1)
        want = model(tokens, targets).mean()
    weights = dict(model.named_parameters())
    places = {"norms.0": "norm", "norms.1": "cms.norms.0", "project": "mixer.project"}
    places |= {"output": "mixer.output", "up": "cms.mlps.0.up", "down": "cms.mlps.0.down"}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            part, _, rest = name.partition(".")
            if part == "layers":
                layer, _, inner = rest.removesuffix(".weight").partition(".")
                name = f"blocks.{layer}.{places[inner]}.weight"
            parameter.copy_(weights[name])
    torch.testing.assert_close(plain(tokens, targets), want, rtol=1e-5, atol=0)
