"""lm-evaluation-harness on models of this package: the same figures as on their exports."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import world
from asked import described
from harness_tasks import DOCUMENTS, save_model, write_tasks

import nlscale
from nlscale import cli
from nlscale.errors import UserError
from nlscale.evaluate.harness import arguments, load, measure, scoring
from nlscale.evaluate.harness.adapter import Adapter
from nlscale.evaluate.harness.suite import SUITES
from nlscale.generate.model import Model
from nlscale.generate.stream import Stream

ALL = ("choice", "sentences", "pages", "say")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness")
    write_tasks(path)
    return path


@pytest.fixture(scope="module")
def export(folder: Path) -> Path:
    from nlscale.checkpoint.export.huggingface import export_huggingface

    export_huggingface(save_model(folder, "hope"), folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def model(export: Path) -> Model:
    return nlscale.load(export.parent / "hope")


def chosen(folder: Path, *names: str) -> str:
    return ",".join(str(folder / f"{name}.yaml") for name in names)


def options(folder: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    return parser.parse_args(["--tasks", chosen(folder, *ALL), *words])


class Working:
    """Stands in for a context: does the parts here, and counts them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.progress = SimpleNamespace(say=lambda line: None)

    def parts(self, parts: Sequence[Any], work: Callable[..., Any], unit: str) -> list[Any]:
        self.names += [part.name for part in parts]
        done = [0.0]
        answers = []
        for part in parts:
            answers.append(work(part, lambda n: done.append(done.pop() + n)))
        assert done[0] == pytest.approx(sum(part.size for part in parts), rel=0.2)
        return [json.loads(json.dumps(answer)) for answer in answers]  # as it is kept


def answers(lm: Any, folder: Path, shots: int | None) -> dict[str, list[dict[str, Any]]]:
    """What the harness keeps of each document, by task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with load.quiet():
        results = simple_evaluate(
            model=lm,
            tasks=chosen(folder, *ALL).split(","),
            task_manager=TaskManager(include_defaults=False),
            num_fewshot=shots,
            bootstrap_iters=0,
        )
    return {name: results["samples"][name] for name in ALL}


@pytest.mark.parametrize(("longest", "shots"), [(None, 2), (48, None)], ids=["whole", "windows"])
def test_answers_are_those_of_the_harness_on_the_export(
    longest: int | None, shots: int | None, model: Model, export: Path
) -> None:
    """Of each document, also few-shot, and where a context or a document is cut."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(
        pretrained=str(export),
        device="cpu",
        batch_size=4,
        max_length=longest or 4096,
        logits_cache=False,  # which takes the wrong end of windows that begin alike
    )
    with pytest.MonkeyPatch.context() as patch:  # what it looks up of the machine takes seconds
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        wanted = answers(theirs, export.parent, shots)
        found = answers(Adapter(model, rows=3, max_length=longest), export.parent, shots)
    texts = set()
    for name in ALL:
        assert len(found[name]) == len(wanted[name]) == len(DOCUMENTS[name])
        for ours, other in zip(found[name], wanted[name], strict=True):
            assert ours["arguments"] == other["arguments"]
            for (one,), (same,) in zip(ours["resps"], other["resps"], strict=True):
                if name == "say":
                    assert one == same
                    texts.add(one)
                elif name == "pages":
                    assert one == pytest.approx(same, rel=1e-5)
                else:
                    assert one[0] == pytest.approx(same[0], rel=1e-5) and one[1] == same[1]
    assert len(texts) > 1, "a test of little otherwise"


def test_figures_are_those_of_the_harness(model: Model, folder: Path) -> None:
    from lm_eval import evaluator

    wanted: list[Any] = []
    context = Working()
    with pytest.MonkeyPatch.context() as patch:
        ask = evaluator.evaluate
        patch.setattr(
            evaluator, "evaluate", lambda **named: wanted.append(ask(**named)) or wanted[0]
        )
        result = measure.evaluate(model, options(folder, "--batch", "4"), cast(Any, context))
    tasks = {task["task"]: task for task in result["tasks"]}
    assert list(tasks) == list(ALL)
    for name, task in tasks.items():
        assert task["documents"] == task["of"] == len(DOCUMENTS[name])
        for one in task["figures"]:
            assert one["value"] == wanted[0]["results"][name][f"{one['metric']},none"]
            low, high = one["interval"]
            assert low <= one["value"] <= high and one["stderr"] >= 0
    shown = result["figures"]
    assert shown["pages/bits_per_byte"] > 0 and 0 <= shown["choice/acc"] <= 1
    assert len(set(context.names)) == len(context.names) > 6, "parts are kept by their names"


def test_a_group_has_the_figures_that_the_harness_makes_of_its_tasks(
    model: Model, folder: Path
) -> None:
    asked = options(folder)
    asked.tasks = arguments.tasks(chosen(folder, "both"))
    tasks = measure.evaluate(model, asked, cast(Any, Working()))["tasks"]
    assert [task["task"] for task in tasks] == ["choice", "sentences", "both"]
    of = [(task["documents"], task["figures"][0]) for task in tasks]
    documents = sum(n for n, _ in of[:2])
    (group,) = tasks[2]["figures"]
    assert of[2][0] == documents
    assert group["value"] == pytest.approx(sum(n * one["value"] for n, one in of[:2]) / documents)
    assert group["interval"][0] < group["value"] < group["interval"][1]


def test_contexts_are_read_once_and_equal_requests_too(model: Model, folder: Path) -> None:
    """Each answer beside what the whole sequence gives by itself."""
    context, other = tuple(b"Q: what? A:"), tuple(b"Q: then?")
    pairs = [
        (context, tuple(b" yes")),
        (context, tuple(b" no")),
        (other, tuple(b"x")),
        (context, tuple(b"y")),
        (context, tuple(b" yes")),
    ]
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        feed = Stream.feed

        def counted(self: Stream, tokens: Any, lengths: Any = None, last: bool = False) -> Any:
            read.append(int(lengths.sum()))
            return feed(self, tokens, lengths, last)

        patch.setattr(Stream, "feed", counted)
        found = Adapter(model)._loglikelihood_tokens([("", list(c), list(a)) for c, a in pairs])
    assert sum(read) == len(context) + len(other) + len(" yes") - 1 + len(" no") - 1
    for (asked, answer), (log_probability, greedy) in zip(pairs, found, strict=True):
        logits = model.logits([[*asked, *answer]])[0, len(asked) - 1 : -1]
        targets = torch.tensor(answer)
        each = logits.log_softmax(-1)[range(len(answer)), targets]
        assert log_probability == pytest.approx(float(each.sum()), rel=1e-5)
        assert greedy == bool((logits.argmax(-1) == targets).all())


def test_what_is_likeliest_is_greedy(model: Model) -> None:
    (one,) = model.logits([list(b"Say")])
    likeliest = int(one[-1].argmax())
    ((_, greedy),) = Adapter(model)._loglikelihood_tokens([("", list(b"Say"), [likeliest])])
    assert greedy


def test_many_continuations_of_one_context_are_several_questions() -> None:
    pairs = [((1,), (n, *[2] * (n % 5))) for n in range(70)]
    asked = scoring.questions(pairs)
    assert len(asked) == 3
    assert {(q.context, c) for q in asked for c in q.continuations} == set(pairs)


def test_logits_that_are_not_finite_are_an_error(model: Model) -> None:
    with pytest.MonkeyPatch.context() as patch:
        feed = Stream.feed
        patch.setattr(Stream, "feed", lambda *a, **b: feed(*a, **b) * math.nan)
        with pytest.raises(UserError, match="logits that are not finite"):
            Adapter(model)._loglikelihood_tokens([("", [1], [2])])


def generated(model: Model, **settings: Any) -> list[str]:
    requests = [SimpleNamespace(args=("Say it:", settings))] * 4
    return Adapter(model, rows=2).generate_until(cast(Any, requests))


def test_samples_of_one_request_differ_and_are_the_same_again(model: Model) -> None:
    settings = {"until": ["e"], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
    first = generated(model, **settings)
    assert len(set(first)) > 1 and not any("e" in text for text in first)
    assert generated(model, **settings) == first
    assert len(set(generated(model, max_gen_toks=8))) == 1, "greedy, unless samples are asked for"


def test_settings_that_are_not_known_are_an_error(model: Model) -> None:
    with pytest.raises(UserError, match="generation_kwargs have num_beams, which is not known"):
        generated(model, until=[], num_beams=4)


def test_what_is_cut_too_short_is_an_error(model: Model) -> None:
    short = Adapter(model, max_length=4)
    with pytest.raises(UserError, match="--max-length 4: an answer of a task has 5 tokens"):
        short._loglikelihood_tokens([("", [1], [2] * 5)])
    with pytest.raises(UserError, match="--max-length 4: a task generates as many tokens"):
        short.generate_until(cast(Any, [SimpleNamespace(args=("a", {"max_gen_toks": 4}))]))


def nlscale_eval(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "harness", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_models_stand_beside_each_other_and_ranks_change_nothing(
    model: Model, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(folder, "attention")
    runs = [str(folder / "hope"), str(folder / "attention")]
    asked = [*runs, "--tasks", chosen(folder, "choice", "sampled"), "--batch", "2", "--limit", "5"]
    assert nlscale_eval(*asked, "--cache", str(tmp_path / "one")) == 0
    printed = capsys.readouterr().out
    assert "the first 5 documents alone" in printed and "acc_norm" in printed
    assert all(f"{run}, step 6" in printed for run in runs)

    assert nlscale_eval(*asked, "--cache", str(tmp_path / "one"), "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    for answer in alone:
        described("harness", answer)
    out = tmp_path / "two.json"
    words = ["eval", "harness", *asked, "--cache", str(tmp_path / "two"), "--json", str(out)]
    ended = world.command(2, words, tmp_path / "ranks")
    assert [one.code for one in ended] == [0, 0], ended
    assert json.loads(out.read_text()) == alone
    assert alone[0]["tasks"][0]["documents"] == 5 and alone[0]["tasks"][0]["of"] == 11


def test_one_that_was_cut_off_goes_on(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nlscale.evaluate.harness import adapter

    likelihoods, asked = adapter.likelihoods, [str(folder / "hope"), "--batch", "2"]
    asked += ["--tasks", chosen(folder, "choice", "pages"), "--cache", str(tmp_path)]
    done: list[int] = []

    def ending(after: int) -> Callable[..., Any]:
        def work(*given: Any) -> Any:
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(len(given[1]))
            return likelihoods(*given)

        return work

    monkeypatch.setattr(adapter, "likelihoods", ending(after=7))
    assert nlscale_eval(*asked) == 130
    assert len(done) == 7, "all of the choices and one part of the pages"
    monkeypatch.setattr(adapter, "likelihoods", ending(after=9))
    assert nlscale_eval(*asked) == 0
    assert len(done) == 9 and sum(done) == len(DOCUMENTS["choice"]) + len(DOCUMENTS["pages"])
    monkeypatch.setattr(adapter, "likelihoods", None)
    again = [*asked, "--batch", "3"]  # which changes no figure
    assert nlscale_eval(*again) == 0, "and a result that is there is not asked for again"


def test_a_model_whose_tokenizer_is_gone_is_given_one(model: Model, folder: Path) -> None:
    poor = Model(model._decoder, model.config, model.step, folder / "gone")
    asked = options(folder, "--limit", "1")
    asked.tasks = arguments.tasks(chosen(folder, "choice"))
    with pytest.raises(UserError, match=r"gone/tokenizer.json; name the folder .* --tokenizer"):
        measure.evaluate(poor, asked, cast(Any, Working()))
    asked.tokenizer = options(folder, "--tokenizer", str(folder / "data")).tokenizer
    found = measure.evaluate(poor, asked, cast(Any, Working()))
    assert found == measure.evaluate(model, asked, cast(Any, Working()))


def test_without_the_hub_one_line_says_what_to_do(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(load, "_answers", lambda: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    assert nlscale_eval(str(folder / "hope"), "--tasks", "paper", "--cache", str(tmp_path)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("nlscale: ")]
    assert all(listed.task in line for listed in SUITES["paper"])
    assert "the Hugging Face hub cannot be reached" in line and "HF_HOME" in line


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            "task: bad\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n",
            "the data of",
        ),
        ("task: bad\ndataset_path: [\n", "cannot be read"),
        ("something: else\n", "cannot be read"),
    ],
)
def test_a_task_that_cannot_be_had_is_named(task: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(task)
    with pytest.raises(UserError, match=f"{said}.*") as caught, load.quiet():
        load.load(arguments.tasks(str(path)))
    assert "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_the_harness_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    class Few:
        task_index, all_tasks = {"piqa": None}, ["piqa"]

        def __init__(self, **named: Any) -> None: ...

    monkeypatch.setattr(load, "TaskManager", Few)
    monkeypatch.setattr(load, "_answers", lambda: True)
    for name, hint in (("piqas", "did you mean 'piqa'?"), ("elsewhere", "`lm_eval ls tasks`")):
        with pytest.raises(UserError, match=f"has no task '{name}'; .*{hint}"):
            load.load([arguments.Chosen(name, "")])


def test_results_are_kept_by_what_the_files_hold(folder: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    path = tmp_path / "choice.yaml"
    (before,) = arguments.tasks(str(path))
    assert before.is_file and arguments.tasks(str(path)) == [before]
    with open(tmp_path / "choice.jsonl", "a") as file:
        file.write('{"q": "one more", "a": ["a", "b", "c"]}\n')
    (after,) = arguments.tasks(str(path))
    assert after.content != before.content, "its data have changed"
    (own,) = arguments.tasks("piqa")
    assert own == ("piqa", metadata.version("lm_eval")) and not own.is_file
