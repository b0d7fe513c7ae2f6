"""Suites of lm-evaluation-harness, and standard errors and intervals of their figures."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
import yaml
from rich.console import Console

from nlscale.errors import UserError
from nlscale.evaluate.harness import arguments, figures, load
from nlscale.evaluate.harness.show import show
from nlscale.evaluate.harness.suite import SUITES
from nlscale.evaluate.trained import Answer


def test_tasks_are_named_alone_or_as_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [task.name for task in arguments.tasks("boolq, paper")]
    assert names[0] == "boolq" and set(names) == {listed.task for listed in SUITES["paper"]}
    for text, said in ((" , ", "names no task"), ("gone.yaml", "cannot read gone.yaml: No such")):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            arguments.tasks(text)
    monkeypatch.setattr(arguments, "_DISTRIBUTION", "surely-not-installed")
    with pytest.raises(UserError, match=r'pip install "nlscale\[eval\]"'):
        arguments.tasks("piqa")


def test_suites_are_of_tasks_and_metrics_that_there_are() -> None:
    for suite in SUITES.values():
        manager = load._manager([arguments.Chosen(listed.task, "") for listed in suite])
        assert len(manager.task_index) < 200, "found without reading all of them"
        for listed in suite:
            path = manager.task_index[listed.task].yaml_path
            text = path.read_text().replace("!function", "")
            metrics = {one["metric"] for one in yaml.safe_load(text).get("metric_list", [])}
            # arc_challenge has its metrics from arc_easy
            assert set(listed.metrics) <= metrics or "include" in text


def named(name: str) -> Callable[[Sequence[Any]], float]:
    from lm_eval.api import metrics

    return cast(Callable[[Sequence[Any]], float], getattr(metrics, name))


@pytest.mark.parametrize("name", ["mean", "perplexity", "weighted_perplexity", "bits_per_byte"])
def test_standard_errors_are_those_of_documents_drawn_again(name: str) -> None:
    generator = np.random.default_rng(3)
    sums = -generator.gamma(4.0, 0.5, 400)
    items: list[Any] = sums.tolist()
    if name in ("weighted_perplexity", "bits_per_byte"):
        weights = generator.integers(5, 50, 400)
        items = [(float(s * w), int(w)) for s, w in zip(sums, weights, strict=True)]
    found = figures.figure(named(name), items)
    assert found is not None and found.stderr is not None and found.interval is not None
    drawn = figures._drawn(found.value, named(name), items)
    # 200 draws know a standard error to 5%: here to four of those
    assert found.value == drawn.value and drawn.stderr is not None
    assert found.stderr == pytest.approx(drawn.stderr, rel=0.2)
    assert np.diff(found.interval) == pytest.approx(np.diff(drawn.interval or ()), rel=0.2)


def test_shares_have_intervals_of_wilson_and_one_document_has_none() -> None:
    found = figures.figure(named("mean"), [1.0] * 10 + [0.0] * 90)
    assert found is not None and found.interval == pytest.approx((0.05523, 0.17437), abs=1e-5)
    assert found.stderr == pytest.approx(math.sqrt(0.1 * 0.9 / 99))
    assert figures.figure(named("mean"), [0.5]) == (0.5, None, None)


def test_the_suite_is_shown_with_its_metrics_and_their_average(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(label: str, value: float) -> Answer:
        one = {"filter": "none", "value": value, "stderr": 0.03, "interval": [0.1, 0.9]}
        both = [{"metric": metric, **one} for metric in ("acc", "acc_norm")]
        tasks = [
            {"task": listed.task, "fewshot": 0, "documents": 8, "figures": both}
            for listed in SUITES["paper"]
        ]
        perplexity = {"metric": "word_perplexity", **one, "value": 2e6}
        tasks[0] = {**tasks[0], "figures": [perplexity]}
        return Answer(label, 3, "hope", {"harness": "1", "limit": None, "tasks": tasks})

    show(Console(width=150), [answer("first", 0.25), answer("second", 0.5)])
    printed = capsys.readouterr().out
    assert printed.count("acc_norm") == 2 and "2e+06" in printed
    # lambada's perplexity is not among the figures; eight accuracies, whose errors are independent
    (average,) = (line for line in printed.splitlines() if "of the accuracies" in line)
    assert "first, step 3" in average and "0.2500" in average
    assert f"{0.03 / math.sqrt(8):.4f}" in average
