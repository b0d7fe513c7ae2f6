"""Which configurations go on with a run that another version, or another command, began."""

from __future__ import annotations

from typing import Any

import pytest

from nlscale.checkpoint.same_run import changed_sources, check_same_run
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError


def config(*overrides: str) -> Config:
    return recipe.load(None, ["data.dir=none", *overrides]).config


def saved(*overrides: str) -> dict[str, Any]:
    return {"config": recipe.to_plain(config(*overrides)), "data": {}, "step": 3}


def saved_before_there_was_a_document_mask() -> dict[str, Any]:
    state = saved()
    del state["config"]["data"]["document_mask"]
    return state


def test_a_key_that_came_later_is_at_its_default() -> None:
    check_same_run(config(), {}, saved_before_there_was_a_document_mask(), "it")


def test_so_is_one_of_a_level() -> None:
    state = saved("levels=[1,4]")
    for level in state["config"]["levels"]["spectrum"]:
        del level["wire"]
    check_same_run(config("levels=[1,4]"), {}, state, "it")
    with pytest.raises(UserError, match=r"levels\.spectrum\.1\.wire: 'fp32' -> "):
        check_same_run(config("levels=[1,4]", "levels.spectrum.1.wire=bf16"), {}, state, "it")
    with pytest.raises(UserError, match=r"levels\.spectrum"):
        check_same_run(config("levels=[1,4,8]"), {}, state, "it")


def test_parts_are_the_same_in_any_order_and_cms_where_they_are_null() -> None:
    level = "levels=[{{period: 1, parts: [{}]}},{}]"
    slow = "{period: 4, parts: [cms]}"
    state = saved(level.format("cms,mixer", "4"))
    check_same_run(config(level.format("mixer,cms", slow)), {}, state, "it")
    with pytest.raises(UserError, match=r"levels\.spectrum\.0\.parts: \['cms', 'mixer'\] -> "):
        check_same_run(config(level.format("mixer,norms", slow)), {}, state, "it")


def test_and_differs_where_it_is_set() -> None:
    state = saved_before_there_was_a_document_mask()
    with pytest.raises(UserError, match=r"data\.document_mask: False -> True"):
        check_same_run(config("data.document_mask=true"), {}, state, "it")
    check_same_run(
        config("data.document_mask=true", "resume.allow=[data.document_mask]"), {}, state, "it"
    )


@pytest.mark.parametrize(
    "free", ["train.kernels=false", "train.recompute=[mixer]", "parallel.tensor=2", "run.dir=other"]
)
def test_how_and_where_it_runs_may_change(free: str) -> None:
    check_same_run(config(free), {}, saved(), "it")


@pytest.mark.parametrize("other", ["optimizer.learning_rate=1e-4", "model.memory.chunk=32"])
def test_what_it_computes_may_not(other: str) -> None:
    with pytest.raises(UserError, match=other.split("=")[0]):
        check_same_run(config(other), {}, saved(), "it")


def test_fewer_steps_than_were_taken_are_refused() -> None:
    longer = saved() | {"step": 30}
    with pytest.raises(UserError, match=r"has taken 30 steps, and train\.steps is 20"):
        check_same_run(config("train.steps=20", "resume.allow=[train.steps]"), {}, longer, "it")


@pytest.mark.parametrize("state", [{}, {"config": {}}, {"config": 7, "data": {}}])
def test_a_state_that_holds_no_run_is_one_line(state: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^it is damaged: its state holds no [^\n]*$"):
        check_same_run(config(), {}, state, "it")


def test_data_of_another_tokenizer_are_allowed_by_themselves() -> None:
    """Other data may be meant; ids of another tokenizer hardly are, and both are named."""
    before = {"fingerprint": "a", "train_tokens": 5, "tokenizer": "bpe:270 sha256:12"}
    now = {"fingerprint": "b", "train_tokens": 6, "tokenizer": "bpe:270 sha256:34"}
    state = {**saved(), "data": before}
    check_same_run(config(), before, state, "it")
    says = r"data\.tokenizer: 'bpe:270 sha256:12' -> 'bpe:270 sha256:34'"
    for allowed in ("resume.allow=[]", "resume.allow=[data]"):
        with pytest.raises(UserError, match=says):
            check_same_run(config(allowed), now, state, "it")
    check_same_run(config("resume.allow=[data,data.tokenizer]"), now, state, "it")
    with pytest.raises(UserError, match=r"(?s)^((?!data\.tokenizer).)*$"):
        check_same_run(config(), {**now, "tokenizer": before["tokenizer"]}, state, "it")


def test_a_tokenizer_that_was_not_recorded_is_the_same() -> None:
    of_old = {"fingerprint": "a", "train_tokens": 5}
    of_new = {**of_old, "tokenizer": "bpe:270 sha256:12"}
    check_same_run(config(), of_new, {**saved(), "data": of_old}, "it")
    check_same_run(config(), of_old, {**saved(), "data": of_new}, "it")
    with pytest.raises(UserError, match="data: "):
        check_same_run(config(), {**of_new, "train_tokens": 6}, {**saved(), "data": of_old}, "it")


SIZES = "train.global_batch=[{from: 0, size: 4}, {from: 40 steps, size: 8}]"
SHARES = "train.global_batch=[{from: 0%, size: 4}, {from: 40%, size: 8}]"
LENGTHS = "data.stages=[{from: 60 steps, sequence_length: 2048}]"


def test_other_stages_are_another_run() -> None:
    state = saved("train.steps=100", SIZES, LENGTHS)
    for other, said in (
        ("train.global_batch.1.size=16", r"train\.global_batch\.1\.size: 8 -> 16"),
        ("train.global_batch.1.from=50 steps", r"global_batch\.1\.from: '40 steps' -> '50 steps'"),
        ("train.global_batch=8", r"train\.global_batch: \["),
        ("data.stages=[]", r"data\.stages: \[.*\] -> \[\]"),
    ):
        with pytest.raises(UserError, match=said):
            check_same_run(config("train.steps=100", SIZES, LENGTHS, other), {}, state, "it")
    check_same_run(config("train.steps=100", SIZES, LENGTHS), {}, state, "it")
    allowed = "resume.allow=[train.global_batch.1.size]"
    wider = ["train.steps=100", SIZES, LENGTHS, "train.global_batch.1.size=16"]
    for begun in (state, saved(*wider)):
        check_same_run(config(*wider, allowed), {}, begun, "it")
    before = saved("train.steps=100")
    del before["config"]["data"]["stages"]  # of a version without
    check_same_run(config("train.steps=100"), {}, before, "it")


def test_a_longer_run_is_the_same_until_a_share_of_it_begins() -> None:
    wsd = ["optimizer.schedule=wsd", "optimizer.decay_fraction=0.2", "optimizer.warmup_steps=1"]
    longer = config("train.steps=200", SHARES, *wsd)
    for step, same in ((40, True), (41, False)):
        state = saved("train.steps=100", SHARES, *wsd) | {"step": step}
        if same:
            check_same_run(longer, {}, state, "it")
            continue
        with pytest.raises(UserError, match=r"train\.steps: 100 -> 200"):
            check_same_run(longer, {}, state, "it")
    state = saved("train.steps=100", SIZES, *wsd) | {"step": 80}
    check_same_run(config("train.steps=200", SIZES, *wsd), {}, state, "it")


def test_samples_of_another_length_have_the_numbers_that_the_stages_give_them() -> None:
    # 50 steps of 4 sequences were taken; what is to be another batch is so from the beginning
    state = saved("train.steps=100", "train.global_batch=4") | {"step": 50, "samples": 200}
    allowed = "resume.allow=[train.global_batch,data.stages]"
    check_same_run(config("train.steps=100", "train.global_batch=8", allowed), {}, state, "it")
    check_same_run(
        config("train.steps=100", "train.global_batch=4", LENGTHS, allowed), {}, state, ""
    )
    with pytest.raises(
        UserError, match=r"taken 200 samples of 1,024 tokens in 50 steps, .* be 400 "
    ):
        check_same_run(
            config("train.steps=100", "train.global_batch=8", LENGTHS, allowed), {}, state, "it"
        )
    late = "train.global_batch=[{from: 0, size: 4}, {from: 50 steps, size: 8}]"
    check_same_run(config("train.steps=100", late, LENGTHS, allowed), {}, state, "it")


def half(steps: int, *overrides: str) -> Config:
    """The second half at twice the length."""
    stages = "data.stages=[{from: 50%, sequence_length: 64}]"
    of = [f"train.steps={steps}", "train.global_batch=4", "data.sequence_length=32", stages]
    return config(*of, *overrides)


@pytest.mark.parametrize(
    ("other", "would_be"),
    [
        (["train.steps=10"], "20 samples of 32 tokens and 4 samples of 64 tokens"),
        (["data.stages=[]"], "24 samples of 32 tokens"),
        (
            ["data.stages.0.sequence_length=128"],
            "12 samples of 32 tokens and 12 samples of 128 tokens",
        ),
        (["data.stages.0.from=4 steps"], "16 samples of 32 tokens and 8 samples of 64 tokens"),
    ],
)
def test_samples_that_were_read_in_another_cut_are_never_allowed(
    other: list[str], would_be: str
) -> None:
    """As many in all: the numbers of a cut would begin where others have been read."""
    state = saved() | {"config": recipe.to_plain(half(6)), "step": 6, "samples": 24}
    changed = "train.steps,data.stages,data.stages.0.from,data.stages.0.sequence_length"
    for allowed in ([], [f"resume.allow=[{changed}]"]):
        with pytest.raises(UserError) as refused:
            check_same_run(half(6, *other, *allowed), {}, state, "it")
        said = str(refused.value)
        assert (
            "12 samples of 32 tokens and 12 samples of 64 tokens in 6 steps" in said
            and would_be in said
        )
        assert "resume.allow" not in said, "which would not help"
    # given in steps it is the same past, and what follows may change
    later = "{from: 3 steps, sequence_length: 64}, {from: 6 steps, sequence_length: 32}"
    allowed = ["resume.allow=[train.steps,data.stages]", f"data.stages=[{later}]"]
    check_same_run(half(10, *allowed), {}, state, "it")


def mixture(**parts: int) -> dict[str, Any]:
    """What identifies a mixture of sources of these names, whose fingerprints they are, too."""
    sources = {
        name: {"name": name, "parts": part, "epochs": None, "tokens": 9}
        for name, part in parts.items()
    }
    return {
        "fingerprint": "all",
        "train_tokens": 90,
        "mixture": {
            "plan": [sources],
            "segments": [{"cut": 0, "first_sample": 0, "sources": sources}],
        },
    }


SOURCES = "data.mixture=[{dir: d/a, weight: 2}, {dir: d/b, weight: 1}]"


def mixed(*overrides: str) -> Config:
    return recipe.load(None, [SOURCES, *overrides]).config


def test_a_mixture_is_another_run_by_what_it_reads_and_not_by_what_it_is_called() -> None:
    state = saved() | {"config": recipe.to_plain(mixed()), "data": mixture(a=2, b=1)}
    moved = mixed("data.mixture.0.dir=else/where", "data.mixture.1.name=other")
    check_same_run(moved, mixture(b=1, a=2), state, "it")
    with pytest.raises(UserError) as refused:
        check_same_run(mixed("data.mixture.0.weight=1"), mixture(a=1, b=1), state, "it")
    said = str(refused.value)
    assert "data.mixture: '0.6667 a; 0.3333 b' -> '0.5 a; 0.5 b'" in said
    assert "'resume.allow=[data.mixture]'" in said
    allowed = mixed("data.mixture.0.weight=1", "resume.allow=[data.mixture]")
    check_same_run(allowed, mixture(a=1, b=1), state, "it")
    # as it goes on, it is the mixture of before no more
    later, begun = mixture(a=1, b=1), mixture(a=2, b=1)["mixture"]["segments"]
    segments = later["mixture"]["segments"]
    later["mixture"]["segments"] = [*begun, {**segments[0], "first_sample": 8}]
    check_same_run(mixed(), mixture(a=1, b=1), state | {"data": later}, "it")
    with pytest.raises(UserError, match=r"resume\.allow=\[data\.mixture\]"):
        check_same_run(mixed(), mixture(a=2, b=1), state | {"data": later}, "it")


def test_mixtures_of_stages_are_compared_as_what_they_read() -> None:
    def annealed(weight: str, start: str = "50%") -> Config:
        listed = f"[{{dir: d/b, weight: {weight}}}, {{dir: d/c, weight: 1}}]"
        return mixed(f"data.stages=[{{from: {start}, mixture: {listed}}}]")

    def data(b: int) -> dict[str, Any]:
        plans = [mixture(a=2, b=1)["mixture"]["plan"], mixture(b=b, c=1)["mixture"]["plan"]]
        return mixture() | {"mixture": {"plan": [*plans[0], *plans[1]], "segments": []}}

    state = saved() | {"config": recipe.to_plain(annealed("1")), "data": data(1)}
    check_same_run(annealed("1"), data(1), state, "it")
    with pytest.raises(UserError) as refused:
        check_same_run(annealed("3"), data(3), state, "it")
    said = str(refused.value)
    assert "'0.6667 a; 0.3333 b, then 0.5 b; 0.5 c' -> '0.6667 a; 0.3333 b, then 0.75 b" in said
    assert "'resume.allow=[data.mixture]'" in said
    with pytest.raises(UserError, match=r"data\.stages\.0\.from: '50%' -> '60%'"):
        check_same_run(annealed("1", "60%"), data(1), state, "it")
    begun = recipe.to_plain(annealed("1"))
    assert changed_sources(annealed("1"), begun) == {}
    assert changed_sources(annealed("3"), begun).keys() == {"data.mixture"}


def test_one_folder_is_the_mixture_of_it() -> None:
    alone = {"fingerprint": "a", "train_tokens": 90}
    state = saved() | {"data": alone}
    check_same_run(mixed(), mixture(a=1), state, "it")
    with pytest.raises(UserError, match=r"data\.mixture: '1 data' -> '0\.5 a; 0\.5 b'"):
        check_same_run(mixed(), mixture(a=1, b=1), state, "it")
    with pytest.raises(UserError, match=r"  data: "):
        check_same_run(config(), alone | {"fingerprint": "b"}, state, "it")
