"""Mixtures over the stages of a run, held to a list that is made step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.mixtures import folder
from data.test_data_mixture import slowly

from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.data.folders import open_folders
from nlscale.data.history import changed, gone_on, identity, ordered
from nlscale.data.mixture import Segment
from nlscale.data.order import seed_of_cut
from nlscale.errors import UserError
from nlscale.train.mixed import end_of, order_of

SIZES = "train.global_batch=[{from: 0, size: 4}, {from: 8 steps, size: 8}]"
STEPS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    folder(out, "web")
    folder(out, "code", documents=2)
    folder(out, "books", documents=5)
    return out


def listed(root: Path, **weights: str) -> str:
    return f"[{', '.join(f'{{dir: {root}/{name}, weight: {w}}}' for name, w in weights.items())}]"


def config_of(root: Path, stages: str, *overrides: str, begin: str | None = None) -> Config:
    begin = f"data.mixture={listed(root, web='2', code='1')}" if begin is None else begin
    given = [begin, f"data.stages=[{stages}]", f"train.steps={STEPS}", "train.micro_batch=1"]
    return recipe.load(None, [*given, "data.sequence_length=24", SIZES, *overrides]).config


WEIGHTS = {
    "begin": {"web": 2, "code": 1},
    "dir": {"web": 1},
    "later": {"web": 1, "books": 3},
    "last": {"code": 1, "web": 1},
}


def stages_of(root: Path) -> dict[str, tuple[Config, list[tuple[int, int, str]]]]:
    """Configurations, and from which step on what they say: (steps before, length, weights)."""
    later, last = (
        listed(root, **{name: str(weight) for name, weight in WEIGHTS[key].items()})
        for key in ("later", "last")
    )
    return {
        "annealing": (
            config_of(root, f"{{from: 50%, mixture: {later}}}"),
            [(0, 24, "begin"), (20, 24, "later")],
        ),
        "of one folder": (
            config_of(root, f"{{from: 50%, mixture: {later}}}", begin=f"data.dir={root}/web"),
            [(0, 24, "dir"), (20, 24, "later")],
        ),
        "there and back": (
            config_of(
                root,
                f"{{from: 5 steps, mixture: {later}}}, {{from: 12 steps, sequence_length: 48}}, "
                f"{{from: 17 steps, mixture: {last}}}, "
                f"{{from: 22 steps, sequence_length: 24, mixture: {later}}}, "
                f"{{from: 30 steps, mixture: {last}}}",
            ),
            [(0, 24, "begin"), (5, 24, "later"), (12, 48, "later"), (17, 48, "last"),
             (22, 24, "later"), (30, 24, "last")],
        ),
        "another length": (
            config_of(root, "{from: 50%, sequence_length: 48}, {from: 75%, sequence_length: 24}"),
            [(0, 24, "begin"), (20, 48, "begin"), (30, 24, "begin")],
        ),
    }  # fmt: skip


def expected(config: Config, changes: list[tuple[int, int, str]]) -> dict[int, list[Any]]:
    """By length: the name of the source and the sample of each number, step by step."""
    folders = {each.name: each for each in open_folders(config.data)}
    names = sorted(folders, key=lambda name: folders[name].fingerprint)
    said: dict[int, list[str]] = {}
    for step in range(STEPS):
        _, length, weights = [each for each in changes if each[0] <= step][-1]
        said.setdefault(length, []).extend([weights] * (4 if step < 8 else 8))
    found = {}
    for cut, (length, weights) in enumerate(said.items()):
        epochs = [(folders[name].train.tokens - 1) // length for name in names]
        begins = [i for i, own in enumerate(weights) if i == 0 or own != weights[i - 1]]
        segments = [
            Segment(i, tuple(WEIGHTS[weights[i]].get(n, 0) for n in names), (None,) * len(names))
            for i in begins
        ]
        slow = slowly(epochs, segments, len(weights), seed_of_cut(config.run.seed, cut))
        found[length] = [(names[source], sample) for source, sample in slow]
    return found


CASES = ["annealing", "of one folder", "there and back", "another length"]


@pytest.mark.parametrize("case", CASES)
def test_each_cut_is_read_in_the_order_of_the_slow_list(root: Path, case: str) -> None:
    config, changes = stages_of(root)[case]
    found = ordered(identity(open_folders(config.data), config, mixed=True), config)
    slow = expected(config, changes)
    assert [cut.sequence_length for cut in found.cuts] == list(slow)
    for cut in found.cuts:
        sources, samples = cut.order.take(0, cut.order.end)
        names = [found.names[source] for source in sources]
        assert list(zip(names, samples.tolist(), strict=True)) == slow[cut.sequence_length]
        for name, length in zip(found.names, cut.lengths, strict=True):
            own = [sample for at, sample in slow[cut.sequence_length] if at == name]
            epochs = [own[i : i + length] for i in range(0, len(own), length)]
            assert all(len(set(epoch)) == len(epoch) for epoch in epochs)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_goes_on_anywhere_has_the_order_of_one_that_was_not_stopped(
    root: Path, case: str
) -> None:
    config, _ = stages_of(root)[case]
    whole = identity(open_folders(config.data), config, mixed=True)
    for step in range(STEPS + 1):
        samples = 4 * min(step, 8) + 8 * max(0, step - 8)
        kept = json.loads(json.dumps(whole))
        assert gone_on(kept, whole, config, step, samples) == whole


def test_another_plan_holds_from_where_the_run_stands(root: Path) -> None:
    before, _ = stages_of(root)["annealing"]
    now, _ = stages_of(root)["there and back"]
    first, second = (
        identity(open_folders(config.data), config, mixed=True) for config in (before, now)
    )
    assert changed(first, second) == (
        "0.6667 web; 0.3333 code, then 0.25 web; 0.75 books",
        "0.6667 web; 0.3333 code, then 0.25 web; 0.75 books, then 0.5 web; 0.5 code, "
        "then 0.25 web; 0.75 books, then 0.5 web; 0.5 code",
    )
    data = gone_on(first, second, now, 7, 28)
    assert changed(data, second) is None and changed(data, first) is not None
    begun, going, planned = (
        ordered(each, config).cuts[0].order.take(0, 120)
        for each, config in ((first, before), (data, now), (second, now))
    )
    # the first plan until the 28th sample; then what the second one says, each where it stood
    assert (going[0][:28] == begun[0][:28]).all() and (going[1][:28] == begun[1][:28]).all()
    assert set(going[0][28:60]) != set(begun[0][:28])
    assert (going[1][28:] != planned[1][28:]).any()
    segments = [(s["cut"], s["first_sample"]) for s in data["mixture"]["segments"]]
    assert segments == [(0, 0), (0, 28), (1, 0), (1, 40), (0, 128)]


def test_after_another_batch_what_is_planned_comes_with_its_step(root: Path) -> None:
    config, _ = stages_of(root)["annealing"]
    whole = identity(open_folders(config.data), config, mixed=True)
    # 4 steps of 10 samples each were taken before the batch was what it is now
    data = gone_on(whole, whole, config, 4, 40)
    firsts = [segment["first_sample"] for segment in data["mixture"]["segments"]]
    assert firsts == [0, 40 + 4 * 4 + 12 * 8]
    order = ordered(data, config, 40 - 4 * 4).cuts[0].order
    assert order.end == 40 + 4 * 4 + 32 * 8


def test_a_mixture_of_a_stage_that_ends_is_named(root: Path) -> None:
    once = f"[{{dir: {root}/code, weight: 1, epochs: 1}}]"
    config = config_of(root, f"{{from: 2 steps, mixture: {once}}}")
    data = identity(open_folders(config.data), config, mixed=True)
    with pytest.raises(UserError, match=r"data\.mixture ends after [\d,]+ of the 288 samples"):
        order_of(data, config)
    ends = end_of(order_of(data, config, checked=False), config)
    assert ends is not None
    code = next(each for each in open_folders(config.data) if each.name == "code")
    # of the 8 samples before, 3 or 2 were of it
    read = (
        (code.train.tokens - 1) // 24
        + 8
        - sum(name == "code" for name, _ in expected(config, [(0, 24, "begin")])[24][:8])
    )
    assert ends[1].order.end == read
