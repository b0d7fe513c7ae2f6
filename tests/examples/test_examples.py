"""A mixer, an optimizer rule and an evaluation of someone else's, trained like our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from train.test_train_run import SMALL, records, small_data

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Store
from nlscale.config import recipe
from nlscale.config.vocabulary import OptimizerConfig
from nlscale.errors import UserError

ROOT = Path(__file__).parents[2]
IMPORTS = ["examples.additions"]
CHOICE = ["model.mixer=retention", "optimizer.rule=lion", "optimizer.learning_rate=3e-4"]
CHOICE += ["evaluate=[backwards]", "checkpoint.every=4 steps", "checkpoint.keep=3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=40, held_out=0.1)


def train(data: Path, run: Path, ranks: int, *overrides: str) -> dict[str, Any]:
    """`nlscale train --import ...` on so many ranks; its summary."""
    path = run.with_suffix(".yaml")
    path.write_text("")
    named = [f"--import={module}" for module in IMPORTS]
    argv = ["train", str(path), *SMALL, *CHOICE, f"data.dir={data}", f"run.dir={run}"]
    ended = world.command(ranks, [*argv, *overrides, *named], run.with_suffix(".out"))
    assert {rank.code for rank in ended} == {0}, ended
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def split(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two tensor-parallel ranks."""
    run = tmp_path_factory.mktemp("split") / "run"
    train(data, run, 2, "parallel.tensor=2")
    return run


def test_they_train_and_two_ranks_give_what_one_gives(
    data: Path, split: Path, tmp_path: Path
) -> None:
    """Lion steps by signs: where an update is almost 0, rounding decides which. With derivatives by
    hand one weight of 130,624 steps the other way at the second step, its momentum the same to
    1.5e-6, and losses are apart by more from there on; with torch's own, none does."""
    runs = {
        name: tmp_path / name.replace(" ", "-") for name in ("whole", "by torch", "split by torch")
    }
    train(data, runs["whole"], 1)
    train(data, runs["by torch"], 1, "train.kernels=false")
    train(data, runs["split by torch"], 2, "parallel.tensor=2", "train.kernels=false")
    steps = {name: records(run, "train") for name, run in (*runs.items(), ("split", split))}
    losses = {name: [r["loss"] for r in of] for name, of in steps.items()}
    assert losses["whole"][-1] < losses["whole"][0] - 0.2
    assert losses["by torch"] == pytest.approx(losses["split by torch"], rel=1e-5)
    assert losses["whole"] == pytest.approx(losses["by torch"], rel=1e-5)
    assert losses["whole"][:2] == pytest.approx(losses["split"][:2], rel=1e-6)
    assert losses["whole"] == pytest.approx(losses["split"], rel=1e-4)
    norms = {
        name: [level["grad_norm"] for level in of[0]["levels"].values()]
        for name, of in steps.items()
    }
    assert norms["whole"] == pytest.approx(norms["split"], rel=1e-6)
    backwards = records(split, "evaluation")
    assert [r["name"] for r in backwards] == ["backwards"] * 4
    assert [r["step"] for r in backwards] == [0, 4, 8, 9]
    forwards = records(split, "validation")
    assert backwards[0]["loss"] != forwards[0]["loss"] > 5


def test_a_run_of_theirs_resumes_bit_for_bit(data: Path, split: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(split, again)
    (again / "summary.json").unlink()
    for checkpoint in sorted((again / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    config = (again / "config.yaml").read_text().replace(str(split), str(again))
    (again / "config.yaml").write_text(config)
    resumed = train(data, again, 2, "parallel.tensor=2")
    assert "step-00000004" in (again / "train.log").read_text()
    first = json.loads((split / "summary.json").read_text())
    for key in ("final_val_loss", "final_train_loss", "tokens"):
        assert resumed[key] == first[key]
    ends = [Store(run / "checkpoints").checkpoints()[-1] for run in (split, again)]
    assert compare(*ends)["bitwise"]
    kept = {name.partition("/")[0] for name in ends[0].tensors()}
    assert kept == {"weights", "momentum"}


def test_what_a_run_holds_is_never_imported(split: Path) -> None:
    """It names its modules, for a person to read; loading it asks for `--import` again."""
    first = (split / "config.yaml").read_text().splitlines()[0]
    assert "--import examples.additions" in first
    for command in ("config", "plan --cluster recipes/clusters/test.yaml", "train"):
        argv = [sys.executable, "-m", "nlscale", *command.split(), str(split / "config.yaml")]
        ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 2, command
        assert "'retention' is not one of hope" in ended.stderr and "--import" in ended.stderr
    argv = [sys.executable, "-m", "nlscale", "config", str(split / "config.yaml")]
    ended = subprocess.run([*argv, f"--import={IMPORTS[0]}"], cwd=ROOT, capture_output=True)
    assert ended.returncode == 0


def test_a_package_in_a_run_folder_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemExit('ran')")
    written = recipe.load(None, ["data.dir=x", "run.imports=[stranger]"]).config
    recipe.write(written, tmp_path / "config.yaml")
    argv = [sys.executable, "-m", "nlscale", "config", "config.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "ran" not in ended.stderr


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("examples.nothing", "--import examples.nothing: there is no module examples.nothing"),
        ("json.decoder", "model.mixer: 'retention' is not one of"),
    ],
)
def test_a_module_that_does_not_help_is_one_line(module: str, said: str) -> None:
    argv = [sys.executable, "-m", "nlscale", "config", "--import", module]
    argv += ["recipes/quickstart.yaml", "model.mixer=retention"]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_an_unknown_evaluation_is_refused_before_anything_starts(
    data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("")
    argv = ["train", str(path), *SMALL, f"data.dir={data}", f"run.dir={tmp_path / 'run'}"]
    (ended,) = world.command(1, [*argv, "evaluate=[los]"], tmp_path / "out")
    assert ended.code == 2
    assert "evaluate: no evaluation is called 'los'; did you mean 'loss'?" in ended.output
    assert not (tmp_path / "run").exists()


def names_are_taken() -> list[str]:
    from examples.retention.facts import RetentionFacts
    from nlscale.evaluate import table as evaluations
    from nlscale.evaluate import trained
    from nlscale.model.mixers import table as mixers
    from nlscale.optim import table as rules

    said = []
    for table, name, new in (
        (mixers, "hope", RetentionFacts()),
        (rules, "adamw", rules.Rule("a:b", ())),
        (evaluations, "loss", evaluations.Evaluation("a:b")),
        (trained, "loss", trained.Trained("", "", "a:b", "a:b", "a:b")),
    ):
        try:
            table.register(name, new)
        except UserError as error:
            said.append(str(error))
    parameter: Any = torch.nn.Parameter(torch.zeros(2, 2))
    parameter.width_multiplier, parameter.decays = 1.0, True
    try:
        whole = rules.Rule("examples.lion:lion", ("momentum",), whole_matrices=True)
        whole.make(OptimizerConfig(), 1.0, [parameter])
    except UserError as error:
        said.append(str(error))
    return said


def test_a_name_belongs_to_one() -> None:
    (said,) = world.run(1, in_root, names_are_taken)
    assert len(said) == 5 and all("already" in line for line in said[:4])
    assert "returned Lion, and takes whole matrices" in said[4]


def in_root(function: Any, *arguments: Any) -> Any:
    """On a rank: call a function that imports the examples."""
    sys.path.insert(0, str(ROOT))
    return function(*arguments)


def in_pieces() -> dict[str, float]:
    """The largest differences: pieces against one shot, and documents against each alone."""
    import numpy as np

    import examples.additions  # noqa: F401
    from nlscale.model.decoder import Decoder
    from nlscale.model.init import initialize
    from nlscale.model.layers import megatron_config
    from nlscale.ops.documents import Documents
    from nlscale.parallel.layout import process_groups

    overrides = [*SMALL, "data.dir=none", "model.mixer=retention"]
    config = recipe.load(None, overrides).config
    with process_groups(config):
        model = Decoder(config, megatron_config(config), 61)
        initialize(model, 1, 0, 1)
        model.double()
        for parameter in model.parameters():
            parameter.grad = None
        tokens = torch.randint(1, 61, (2, 20))
        whole, _ = model.hidden(tokens)
        states, parts = None, []
        for piece in tokens.split([1, 7, 12], dim=1):
            part, states = model.hidden(piece, states)
            parts.append(part)
        tokens = tokens.clone()
        tokens[:, 9] = 0
        documents = Documents.of(tokens.numpy(), 0, 16, torch.device("cpu"))
        together, _ = model.hidden(tokens, documents=documents)
        alone, _ = model.hidden(tokens[:, 9:])
        lengths = torch.tensor([5, 14])
        _, states = model.hidden(tokens[:, :14], lengths=lengths)
        onward, _ = model.hidden(tokens[:, :6], states)
        beside = [onward[:, i] for i in range(2)]
        one_by_one = [
            model.hidden(torch.cat([row[:n], row[:6]])[None])[0][n:, 0]
            for row, n in zip(tokens, lengths.tolist(), strict=True)
        ]
        whole.square().sum().backward()
        mixers = [p for n, p in model.named_parameters() if ".mixer." in n]
        return {
            "pieces": float((torch.cat(parts) - whole).detach().abs().max()),
            "rows": float((torch.stack(beside) - torch.stack(one_by_one)).detach().abs().max()),
            "documents": float((together[9:] - alone).detach().abs().max()),
            "gradient": min(float(np.abs(p.grad.numpy()).max()) for p in mixers),
        }


def test_retention_streams_and_keeps_documents_apart() -> None:
    (found,) = world.run(1, in_root, in_pieces)
    assert found["pieces"] < 1e-6 and found["documents"] < 1e-6  # its state is fp32
    assert found["rows"] < 1e-6
    assert found["gradient"] > 0


def lion_against_formula() -> float:
    from examples.lion import lion
    from nlscale.config.vocabulary import OptimizerConfig

    config = OptimizerConfig(learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.5)
    parameter: Any = torch.nn.Parameter(torch.randn(4, 5))
    parameter.width_multiplier, parameter.decays = 1.0, True
    p, m = parameter.detach().clone().double(), torch.zeros(4, 5).double()
    optimizer: Any = lion(config, 1.0, [parameter])
    for step in range(6):
        parameter.grad = g = torch.randn(4, 5)
        optimizer.found_inf = torch.tensor(float(step == 3))
        optimizer.step()
        if step != 3:
            p -= 0.1 * ((0.9 * m + 0.1 * g.double()).sign() + 0.5 * p)
            m = 0.99 * m + 0.01 * g.double()
    assert optimizer.state[parameter]["step"] == 5
    return float((parameter.detach() - p).abs().max())


def test_lion_is_its_formula_and_leaves_an_empty_window_alone() -> None:
    (difference,) = world.run(1, in_root, lion_against_formula)
    assert difference < 1e-5


@pytest.mark.parametrize("named_in", ["recipe", "command"])
def test_a_sweep_passes_their_modules_on(named_in: str, data: Path, tmp_path: Path) -> None:
    small = "\n".join(f"{key}: {value}" for key, value in (o.split("=", 1) for o in SMALL))
    keys = "".join(f"  {line}\n" for line in small.splitlines())
    imports = f"run: {{imports: {IMPORTS}}}\n" if named_in == "recipe" else ""
    (tmp_path / "recipe.yaml").write_text(imports)
    (tmp_path / "sweep.yaml").write_text(
        f"recipe: {tmp_path}/recipe.yaml\ndir: {tmp_path}/runs\nset:\n{keys}"
        f"  data.dir: {data}\n  model.mixer: retention\n  optimizer.rule: lion\n"
        f"axes: {{run.seed: [1]}}\nworkers: 1\n"
    )
    argv = [sys.executable, "-m", "nlscale", "sweep", str(tmp_path / "sweep.yaml")]
    argv += [f"--import={IMPORTS[0]}"] if named_in == "command" else []
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "runs" / "seed1" / "summary.json").exists()


def test_their_runs_can_be_inspected_compared_and_benched(split: Path, tmp_path: Path) -> None:
    last = str(sorted((split / "checkpoints").glob("step-*"))[-1])
    for command in (
        ["checkpoint", "inspect", str(split)],
        ["checkpoint", "diff", last, last],
        ["bench", "coords", "model.mixer=retention", "--widths", "32", "64", "--steps", "1"],
    ):
        (ended,) = world.command(1, [*command, f"--import={IMPORTS[0]}"], tmp_path)
        assert ended.code == 0, (command, ended.output)


def test_their_evaluation_is_asked_of_a_trained_model(split: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    asked = ["eval", "guesses", str(split), "--contexts", "2", "--json", str(out)]
    (ended,) = world.command(1, [*asked, f"--import={IMPORTS[0]}"], tmp_path)
    assert ended.code == 0, ended.output
    said = json.loads(out.read_text())
    guessed = said["guessed"]
    assert said["mixer"] == "retention" and guessed["of"] == 2 * 32 and 0 <= guessed["share"] <= 1
    assert f"{100 * guessed['share']:.1f}%" in ended.output
    (kept,) = (split / "evals").iterdir()
    assert kept.name.startswith("guesses-step9-")


def mistaken(mistake: str) -> str:
    """What is said of a mixer or a rule that is not what its table says."""
    from examples import additions  # noqa: F401
    from examples.lion import Lion
    from examples.retention.facts import RetentionFacts
    from examples.retention.module import Retention
    from nlscale.levels.state import Shard
    from nlscale.model.decoder import Decoder
    from nlscale.model.layers import megatron_config
    from nlscale.parallel.layout import process_groups

    if mistake == "count":
        RetentionFacts.parameters = lambda self, model: 7  # type: ignore[method-assign]
    if mistake == "untagged":
        make = Retention.__init__

        def untagged(self: Any, *given: Any) -> None:
            make(self, *given)
            self.scale = torch.nn.Parameter(torch.ones(2))

        Retention.__init__ = untagged  # type: ignore[method-assign]
    config = recipe.load(None, [*SMALL, "data.dir=none", "model.mixer=retention"]).config
    try:
        if mistake == "state":
            weights = torch.nn.Parameter(torch.zeros(3))
            inner = Lion([{"params": [weights], "lr_mult": 1.0}], lr=0.1)
            weights.grad = torch.ones(3)
            inner.step()
            group: Any = None
            Shard("w", weights, group, 0, weights, inner, ("velocity",)).state()
        with process_groups(config):
            Decoder(config, megatron_config(config), 61)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (
            "count",
            "its facts say 7 parameters a layer, with the norm before it, and its module",
        ),
        ("untagged", "its parameter scale is not tagged"),
        ("state", "Lion keeps momentum, step of each parameter, and its rule says step, velocity"),
    ],
)
def test_what_contradicts_the_table_is_refused(mistake: str, said: str) -> None:
    (found,) = world.run(1, in_root, mistaken, mistake)
    assert said in found
