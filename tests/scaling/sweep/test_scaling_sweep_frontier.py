"""The shipped frontier sweeps: each setting can be planned, and sends what it is to send."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from scaling.run_folders import VOCABULARY, finished

from nlscale.cluster.machines import load_cluster
from nlscale.levels.notes import approximate
from nlscale.levels.spectrum import levels_of
from nlscale.model.sizes import level_parameters
from nlscale.plan import make_plan
from nlscale.scaling.law.network import Sent, sent_on
from nlscale.scaling.law.points import read_points
from nlscale.scaling.sweep.runs import Run, expand
from nlscale.scaling.sweep.spec import read_sweep

ROOT = Path(__file__).parents[3]
SWEEPS = {
    "frontier": "two-nodes",
    "frontier-muon": "two-nodes",
    "frontier-four-nodes": "four-nodes",
}
BITS = {"fp32": 32, "int8": 8 + 32 / 128, "int4": 4 + 32 / 128}
EXACT = {
    "every.step", "periods", "period.4", "wide.slow", "mixer.4", "mixer.16",
    "outer.slow", "warm.up",
}  # fmt: skip


def settings_of(name: str) -> dict[str, Run]:
    sweep = read_sweep(ROOT / f"recipes/sweeps/{name}.yaml")
    runs = expand(sweep, wanted=lambda axes: axes["run.seed"] == "seed2")
    return {run.axes["setting"]: run for run in runs}


@pytest.fixture(scope="module", params=SWEEPS)
def swept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Run], dict[str, Sent]]:
    """A sweep's name, and by setting its runs and what they would send."""
    name, folder = request.param, tmp_path_factory.mktemp("runs")
    runs = settings_of(name)
    for setting, run in runs.items():
        finished(folder / setting, run.config, 2.0)
    points, skipped = read_points([folder])
    assert not skipped
    sent = sent_on(points, load_cluster(SWEEPS[name]))
    return name, runs, {Path(one.run).name: one for one in sent}


def test_all_are_pairs_of_the_reference(
    swept: tuple[str, dict[str, Run], dict[str, Sent]],
) -> None:
    _, runs, sent = swept
    assert len({one.setting for one in sent.values()}) == len(runs), "a name each"
    assert len({one.group for one in sent.values()}) == 1, "equal model, tokens and data"
    assert len({run.parameters for run in runs.values()}) == 1
    assert max(sent.values(), key=lambda one: one.bytes).run.endswith("every.step")


def test_each_sends_what_its_levels_say_and_its_plan(
    swept: tuple[str, dict[str, Run], dict[str, Sent]],
) -> None:
    name, runs, sent = swept
    # a rank a node, as the runs have them: what a node sends does not depend on it
    cluster = replace(load_cluster(SWEEPS[name]), gpus_per_node=1)
    for setting, run in runs.items():
        config = run.config
        plan = make_plan(config, cluster).to_plain()
        tokens = config.train.global_batch * config.data.sequence_length
        # A plan's mean is of aligned blocks; staggered ones change their periods at other steps.
        near = 1e-3 if setting == "warm.up" else 1e-6
        assert plan["total"]["mean_bytes_per_step"] == pytest.approx(
            sent[setting].bytes_per_token * tokens, rel=near
        )
        if setting == "warm.up":
            continue
        a_step = 0.0
        for level, parameters in zip(
            config.levels.spectrum, level_parameters(config, VOCABULARY), strict=True
        ):
            steps = int(level.period.split()[0])
            every = steps * (level.outer.every or 1 if level.local else 1)
            there_and_back = 2 * (cluster.nodes - 1) / cluster.nodes
            a_step += there_and_back * parameters * BITS[level.wire.value] / 8 / every
        assert sent[setting].bytes_per_token * tokens == pytest.approx(a_step), setting


def test_what_is_exact_is_exact(swept: tuple[str, dict[str, Run], dict[str, Sent]]) -> None:
    _, runs, sent = swept
    exact = {setting for setting, one in sent.items() if not one.approximate}
    assert exact == EXACT & set(runs)
    for setting, run in runs.items():
        assert bool(approximate(levels_of(run.config), True)) == (setting not in exact)


def test_a_warm_up_sends_more_than_its_periods_and_less_than_every_step(
    swept: tuple[str, dict[str, Run], dict[str, Sent]],
) -> None:
    name, _, sent = swept
    if name == "frontier":
        assert sent["periods"].bytes < sent["warm.up"].bytes < sent["every.step"].bytes


def test_both_have_the_same_settings_of_one_name() -> None:
    two, four = settings_of("frontier"), settings_of("frontier-four-nodes")
    for setting, run in four.items():
        assert run.config.levels == two[setting].config.levels
        assert run.config.optimizer == two[setting].config.optimizer


@pytest.mark.parametrize(("name", "cluster"), SWEEPS.items())
def test_the_commands_at_its_head_are_of_it(name: str, cluster: str) -> None:
    text = (ROOT / f"recipes/sweeps/{name}.yaml").read_text()
    (fit,) = re.findall(r"^# nlscale fit (.*)$", text, re.MULTILINE)
    assert fit == f"runs/sweeps/{name} --frontier {name}.png --cluster {cluster}"
    assert re.search(rf"^# nlscale sweep {name} --build-data$", text, re.MULTILINE)
    assert str(read_sweep(ROOT / f"recipes/sweeps/{name}.yaml").folder) == f"runs/sweeps/{name}"
