"""A plan of levels that name their parts."""

from __future__ import annotations

import pytest
from rich.console import Console

from nlscale.cluster.machines import Cluster
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.levels.spectrum import levels_of, planned_updates
from nlscale.plan import make_plan
from nlscale.plan.tables import print_plan

LAYERS, WIDTH, VOCABULARY = 4, 32, 50
ENDS = (
    "levels=[{name: fast, period: 1}, {name: head, period: 8, parts: [head]}, "
    "{name: embedding, period: 8, parts: [embedding]}]"
)


def make(*overrides: str) -> Config:
    sizes = [f"model.layers={LAYERS}", f"model.d_model={WIDTH}", f"model.vocabulary={VOCABULARY}"]
    fixed = ["data.dir=none", "model.heads=4", "train.global_batch=8", "train.micro_batch=4"]
    return recipe.load(None, [*fixed, *sizes, *overrides]).config


CLUSTER = Cluster("c", nodes=2, gpus_per_node=1, inter_node_gbit=1.0, gpu_memory_gib=80.0)


def test_everything_slow_sends_as_many_times_fewer_bytes_as_its_period() -> None:
    every = "cms, mixer, embedding, head, norms"
    found = make_plan(make(f"levels=[{{name: all, period: 8, parts: [{every}]}}]"), CLUSTER)
    assert found.fewer == 8
    kept = make("levels=[{period: 1, parts: [norms]}, {period: 8, parts: [cms, mixer, embedding, "
                "head]}]")  # fmt: skip
    found = make_plan(kept, CLUSTER)
    norms = WIDTH * (2 * LAYERS + 1)
    assert found.levels[0].parameters == norms
    assert found.aligned.mean == 4 * (norms + found.levels[1].parameters / 8)


def test_ends_of_the_model_update_once_a_period_at_the_phase_of_their_depth() -> None:
    config = make(ENDS, "train.steps=24")
    _, head, embedding = levels_of(config)
    # phase 3 * 8 / 4 = 6: steps 6, 14, 22, and the partial window at the end; 0: 8, 16, 24
    assert (planned_updates(config, head), planned_updates(config, embedding)) == (4, 3)
    found = make_plan(config, CLUSTER).staggered.bytes_per_level
    table = 4.0 * VOCABULARY * WIDTH
    # the last norm is with what it feeds, the head
    assert found[1].tolist() == [table + 4 * WIDTH if step == 6 else 0 for step in range(1, 9)]
    assert found[2].tolist() == [table if step == 8 else 0 for step in range(1, 9)]


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_link_time_is_that_of_the_bytes(overlap: str) -> None:
    config = make(ENDS, f"parallel.overlap={overlap}", "parallel.bucket_size=500")
    found = make_plan(config, CLUSTER, step_seconds=0.1)
    assert found.exposure is not None
    run, mean = found.exposure.run, found.staggered.mean_per_level
    for level in range(3):
        of_link = CLUSTER.link_seconds(float(mean[level]))
        assert run.hidden[level] + run.exposed[level] == pytest.approx(of_link)
    # the gradient of the head is there first, and that of the embedding last
    assert (run.hidden[1] > 0) == (overlap == "true") and run.hidden[2] == 0


def test_the_table_says_where_parts_are(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*overrides: str) -> str:
        print_plan(make_plan(make(*overrides), CLUSTER), Console(width=200))
        return capsys.readouterr().out

    said = "Parts of the model: fast has cms, mixer; head has cms, head; embedding has embedding."
    assert said in printed(ENDS.replace("[head]", "[cms, head]"))
    assert "Parts of the model" not in printed("levels=[1,4]")
