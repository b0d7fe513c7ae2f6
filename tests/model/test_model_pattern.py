"""Blocks with mixers in a pattern: what is counted, planned, cut, saved, streamed and exported."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import world
from checkpoint.resume_runs import checkpoint, train
from golden.make import losses
from model.conftest import VOCABULARY, tiny
from model.test_model_flops import make
from plan.test_plan_activations import compare

from nlscale.checkpoint.diff import compare as difference
from nlscale.checkpoint.export.carried import modeling_source
from nlscale.checkpoint.export.class_keys import check_class_keys, class_keys
from nlscale.checkpoint.same_run import changed_keys
from nlscale.config import recipe
from nlscale.config.pattern import text_of
from nlscale.config.presets import MIXER_PRESETS
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.levels.groups import parameters_by_depth
from nlscale.model.flops import flops_by_part
from nlscale.model.mixers.attention.module import Attention
from nlscale.model.mixers.memory.module import MemoryMixer
from nlscale.model.pattern import block_kinds
from nlscale.model.sizes import block_parameters, level_matrices, level_parameters
from nlscale.model.stages import EMBEDDING_COST, stage_blocks
from nlscale.ops.documents import Documents
from nlscale.plan.checks import check_sizes
from nlscale.scaling.compare.runs import _keys_of_mixer

WINDOW = "model.attention.window=5"
PATTERN = ["model.pattern=[hope,sliding-window,retnet]", "model.layers=5", WINDOW]


def test_a_pattern_of_one_name_is_that_mixer(build, tokens, mixer: str) -> None:
    name = mixer.partition("=")[2]
    one, other = build(mixer, WINDOW), build(f"model.pattern=[{name}]", WINDOW)
    assert dict(one.named_parameters()).keys() == dict(other.named_parameters()).keys()
    with torch.no_grad():
        assert torch.equal(*(m.logits(m.hidden(tokens)[0]) for m in (one, other)))


@pytest.fixture(scope="module")
def patterned(build):
    return build(*PATTERN).double()


def test_each_block_has_its_own_mixer_and_what_that_says(patterned) -> None:
    mixers = [block.mixer for block in patterned.blocks.values()]
    kinds = [MemoryMixer, Attention, MemoryMixer, MemoryMixer, Attention]
    assert [type(mixer) for mixer in mixers] == kinds
    assert [mixer.modifies_itself for mixer in mixers if isinstance(mixer, MemoryMixer)] == [
        True, False, True,
    ]  # fmt: skip
    assert mixers[1].window == 5
    kinds = block_kinds(tiny(*PATTERN, "model.memory.eta_bias=-1"))
    assert [kind.depths for kind in kinds] == [[0, 3], [1, 4], [2]]
    memories = [kind.config.model.memory for kind in kinds]
    assert memories[0].lambda_init == 0.3 and memories[2].static_gates is False
    assert [memory.eta_bias for memory in memories] == [-1, -1, -1]  # what is given wins


def test_parameters_and_matrices_are_counted_where_they_are(patterned) -> None:
    config = tiny(*PATTERN)
    found, matrices = [0] * 5, [{} for _ in range(5)]
    for name, parameter in patterned.named_parameters():
        level, depth = patterned.level_and_depth(name)
        assert level == 0
        found[depth] += parameter.numel()
        if not parameter.matrix:
            continue
        rows, columns = parameter.shape[-2:]
        for size in parameter.sections or (rows,):
            many = len(parameter) if parameter.dim() == 3 else 1
            shapes = matrices[depth]
            shapes[size, columns] = shapes.get((size, columns), 0) + many
    assert parameters_by_depth(config, VOCABULARY) == [found]
    assert level_parameters(config, VOCABULARY) == [sum(found)]
    assert level_matrices(config) == [matrices]


def test_a_pattern_is_as_large_and_costs_the_sum_of_its_mixers() -> None:
    keys = ["model.layers=4", "model.d_model=256", "model.heads=4", "data.sequence_length=512"]
    config = tiny(*PATTERN, *keys, "model.hidden=null", "model.layers=6", WINDOW)
    blocks = sum(level_parameters(config, vocabulary=0))
    assert blocks == pytest.approx(6 * 12 * 256**2, rel=0.01)
    keys += ["model.hidden=400", "model.layers=6", WINDOW]
    parts: dict[str, float] = {}
    for name in ("hope", "sliding-window", "retnet"):
        for part, flops in flops_by_part(tiny(f"model.mixer={name}", *keys), 64).items():
            parts[part] = parts.get(part, 0) + flops / 3
    found = flops_by_part(tiny(*PATTERN, *keys), 64)
    assert found == pytest.approx(parts)
    of_window = [tiny("model.mixer=sliding-window", *keys[:-1], f"model.attention.window={w}")
                 for w in (40, 1000)]  # fmt: skip
    seen = sum(min(t, 40) for t in range(1, 513)), 512 * 513 / 2
    costs = [flops_by_part(one, 64)["attention"] for one in of_window]
    assert costs[0] / costs[1] == pytest.approx(seen[0] / seen[1])


def test_what_blocks_keep_is_what_stays_alive() -> None:
    def of(mixers: str, dtype: str, *keys: str) -> Config:
        return make(f"model.pattern={mixers}", f"train.dtype={dtype}", *keys)

    window = "model.attention.window=32"
    compare(
        [
            of("[retnet,sliding-window]", "fp32", window),
            of("[deltanet,sliding-window]", "bf16", window, "model.attention.kv_heads=1"),
            of("[retnet,sliding-window]", "bf16", window, "train.kernels=false"),
            of("[linear-attention,attention]", "fp32", "train.recompute=[mixer]"),
        ],
        ranks=1,
    )


@pytest.mark.parametrize(("count", "vocabulary"), [(2, 0), (3, 0), (3, 4000), (4, 4000)])
def test_stages_of_blocks_that_differ_are_cut_where_the_costliest_is_least(
    count: int, vocabulary: int
) -> None:
    config = tiny("model.pattern=[hope,retnet,retnet,attention,attention]", "model.layers=9",
                  f"parallel.pipeline={count}")  # fmt: skip
    blocks, table = block_parameters(config), vocabulary * config.model.d_model

    def cost(bounds: tuple[int, ...]) -> float:
        costs = [sum(blocks[a:b]) for a, b in itertools.pairwise(bounds)]
        costs[0] += EMBEDDING_COST * table
        costs[-1] += table
        return max(costs)

    stages = stage_blocks(config, vocabulary)
    assert [stage.start for stage in stages[1:]] == [stage.stop for stage in stages[:-1]]
    every = [(0, *inside, 9) for inside in itertools.combinations(range(1, 9), count - 1)]
    found = cost((0, *(stage.stop for stage in stages)))
    assert found == pytest.approx(min(map(cost, every)))


def test_documents_of_a_row_are_each_alone(patterned) -> None:
    tokens = torch.randint(VOCABULARY - 1, (1, 25), generator=torch.Generator().manual_seed(3))
    tokens[0, [9, 14]] = VOCABULARY - 1
    where = Documents.of(tokens[:, :-1].numpy(), VOCABULARY - 1, 4, torch.device("cpu"))
    with torch.no_grad():
        together = patterned(tokens[:, :-1], tokens[:, 1:], where)
        alone = [
            patterned(tokens[:, a:b], tokens[:, a + 1 : b + 1])
            for a, b in ((0, 9), (9, 14), (14, 24))
        ]
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-10)


def test_split_over_ranks_it_learns_what_one_rank_does() -> None:
    options = [
        "model.pattern=[hope,retnet,sliding-window]", "model.layers=3", "model.d_model=32",
        "model.attention.window=8",
    ]  # fmt: skip
    (one,) = world.run(1, losses, "gated-delta", options)
    split = ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]
    for curve in world.run(4, losses, "gated-delta", [*options, *split]):
        assert curve == pytest.approx(one, abs=1e-4)
    assert one[-1] < one[0] - 0.5


def test_it_resumes_to_the_bit(tmp_path: Path) -> None:
    keys = [
        "levels=[1,3]", "train.steps=5", "data.sequence_length=16", "optimizer.rule=muon",
        "train.global_batch=2", "model.pattern=[linear-attention,sliding-window,deltanet]",
        "model.attention.window=8",
    ]  # fmt: skip
    (whole,) = world.run(1, train, keys, tmp_path / "whole", (2,), False)
    shutil.copytree(tmp_path / "whole", tmp_path / "rest")
    shutil.rmtree(checkpoint(tmp_path / "rest", 5).path)
    (resumed,) = world.run(1, train, keys, tmp_path / "rest", (), True)
    assert list(resumed["losses"]) == [3, 4, 5]
    assert resumed["losses"] == {step: whole["losses"][step] for step in (3, 4, 5)}
    result = difference(checkpoint(tmp_path / "rest", 5), checkpoint(tmp_path / "whole", 5))
    assert result["bitwise"], result


def test_another_pattern_is_another_run_and_nulls_are_no_choice() -> None:
    one, other = (tiny(f"model.pattern=[{names}]") for names in ("hope,attention", "hope"))
    assert list(changed_keys(one, recipe.to_plain(other))) == ["model.pattern"]
    assert recipe.to_plain(one)["model"]["memory"]["c"] is None
    assert _keys_of_mixer("hope", "[hope, attention]")["model.memory.c"] == "null"
    before = recipe.to_plain(one)
    del before["model"]["pattern"][0]["memory"]["chunk_momentum"]  # saved before there was one
    assert not changed_keys(one, before)


def test_entries_have_memories_of_their_own(tmp_path: Path, monkeypatch) -> None:
    keys = ["model.memory.eta_bias=-1", "model.layers=3"]
    short = "[hope, {mixer: gated-delta, memory: {chunk: 8, gain: kalman}}, attention]"
    made = recipe.load(None, ["data.dir=none", f"model.pattern={short}", *keys])
    kinds = block_kinds(made.config)
    hope, delta, _ = (kind.config.model.memory for kind in kinds)
    assert [hope.chunk, delta.chunk] == [64, 8] and hope.eta_bias == delta.eta_bias == -1
    assert [hope.gain.value, delta.gain.value] == ["learned", "kalman"]
    recipe.write(made.config, tmp_path / "config.yaml")
    monkeypatch.setitem(MIXER_PRESETS["hope"], "c", 1.0)  # of a later version
    again = recipe.load(tmp_path / "config.yaml").config
    assert again == made.config, "a run keeps what a preset was"
    monkeypatch.undo()
    text = text_of(recipe.to_plain(made.config)["model"])
    assert recipe.load(None, ["data.dir=none", f"model.pattern={text}", *keys]).config == again
    with pytest.raises(UserError, match=r"chunks of 8, 64, and data\.document_mask"):
        check_sizes(
            tiny(
                f"model.pattern={short}",
                "model.layers=3",
                "model.memory.chunk=64",
                "data.document_mask=true",
            ),
            1,
        )


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["model.pattern=[hope,hope,attention]"], "names 3 mixers, and model.layers is 2"),
        (["model.pattern=[hope,retnet]", WINDOW], "attention.window is 5"),
        (["model.pattern=[hope,attention]", WINDOW], "use model.mixer=sliding-window"),
        (["model.pattern=[attention,gated-delta]", "model.memory.strength=2"], "explodes"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_sizes(tiny(*keys), 1)


def test_names_are_those_of_mixers() -> None:
    with pytest.raises(UserError, match=r"model\.pattern\.1\.mixer: 'hop' is not one of hope"):
        tiny("model.pattern=[hope,hop]")


def test_a_size_of_attention_heads_is_not_that_of_memories() -> None:
    config = tiny("model.pattern=[hope,attention]", "model.attention.head_dim=8")
    sizes = [kind.config.model.attention.head_dim for kind in block_kinds(config)]
    assert sizes == [None, 8]
    check_sizes(config, 1)


def test_an_export_to_hugging_face_carries_all_mixers() -> None:
    keys = class_keys(tiny("model.pattern=[hope,attention]"))
    assert [entry["mixer"] for entry in keys["pattern"]] == ["hope", "attention"]
    assert "mixer" not in keys
    alike = class_keys(tiny("model.pattern=[gated-delta,gated-delta]"))
    assert alike == class_keys(tiny("model.mixer=gated-delta"))
    source = modeling_source(["hope", "attention", "hope"])
    assert '{"attention": PlainAttention, "hope": PlainMemory}[name]' in source
    compile(source, "modeling_nlscale.py", "exec")


def test_an_export_of_another_version_may_have_other_options() -> None:
    config, where = tiny("model.pattern=[hope,attention]"), Path("export")
    described = class_keys(config)
    described["pattern"][0]["mixer_options"] |= {"brought_later": 1}
    check_class_keys(described, config, where)
    described["pattern"][1]["mixer_options"] |= {"heads": 7}
    with pytest.raises(UserError, match=r"says pattern=.*'heads': 7"):
        check_class_keys(described, config, where)
