"""`nlscale checkpoint list|inspect|verify|diff`, on files as a run leaves them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.saved_runs import SLOW, config, contents, save, state
from checkpoint.stores import flip
from torch import Tensor

from nlscale import cli
from nlscale.checkpoint import diff
from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.mirror.copy import Progress, copy
from nlscale.checkpoint.mirror.remote import Remote
from nlscale.checkpoint.store.store import Checkpoint, Store
from nlscale.parallel.layout import process_groups

Ended = tuple[int, str, str]
Nlscale = Callable[..., Ended]
Tensors = dict[str, Tensor]


@pytest.fixture
def nlscale(capsys: pytest.CaptureFixture[str]) -> Nlscale:
    """Run `nlscale checkpoint` in this process; its exit code, stdout and stderr."""

    def run(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main(["checkpoint", *map(str, arguments)])
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def tensors() -> Iterator[Tensors]:
    with process_groups(config()):
        yield contents(1)


@pytest.fixture
def run(tmp_path: Path, tensors: Tensors) -> Path:
    """A run with checkpoints at steps 2 and 6."""
    for step in (2, 6):
        save(tmp_path / "run", step, tensors)
    return tmp_path / "run"


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def read(ended: Ended) -> dict[str, Any]:
    """The JSON that a command printed."""
    code, out, err = ended
    assert (code, err) == (0, "")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(found, dict)
    return found


def refused(ended: Ended) -> str:
    """The one line with which a command ended that was wrongly asked."""
    code, out, err = ended
    assert (code, out) == (2, "")
    assert err.startswith("nlscale: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def test_list_shows_each_checkpoint_and_which_is_the_latest(nlscale: Nlscale, run: Path) -> None:
    (run / "checkpoints" / "step-00000009.partial").mkdir()
    for folder in (run, run / "checkpoints"):
        found = read(nlscale("list", folder, "--json"))
        assert found["latest"] == "step-00000006"
        assert found["unfinished"] == ["step-00000009.partial"]
        assert [entry["step"] for entry in found["checkpoints"]] == [2, 6]
        assert [entry["tokens"] for entry in found["checkpoints"]] == [2 * 128, 6 * 128]
        assert [entry["latest"] for entry in found["checkpoints"]] == [False, True]
    for entry in found["checkpoints"]:
        files = list(step_folder(run, entry["step"]).iterdir())
        assert entry["files"] == len(files)
        assert entry["bytes"] == sum(file.stat().st_size for file in files)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}Z", entry["created"])
    code, out, _ = nlscale("list", run)
    rows = [line for line in out.splitlines() if line.strip().startswith(("2 ", "6 "))]
    assert code == 0 and len(rows) == 2
    assert "256" in rows[0] and "LATEST" not in rows[0]
    assert "768" in rows[1] and "LATEST" in rows[1]
    assert "step-00000009.partial" in out
    assert max(map(len, rows)) <= 80


def test_list_of_a_mirror_shows_what_is_there(nlscale: Nlscale, run: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/mirror"
    code, _, said = nlscale("list", url)
    assert code == 2 and f"no finished checkpoint in {url}" in said
    remote = Remote(url)
    for checkpoint in Store(run / "checkpoints").checkpoints():
        copy(checkpoint, remote, Progress(checkpoint.step), lambda: None)
    there = read(nlscale("list", url, "--json"))
    assert there == {**read(nlscale("list", run, "--json")), "folder": url}
    code, shown, _ = nlscale("list", url)
    assert code == 0 and url in shown and "is missing" not in shown and "not there" not in shown
    (tmp_path / "mirror/step-00000002/state.json").unlink()
    (tmp_path / "mirror/step-00000006/manifest.json").unlink()
    damaged = read(nlscale("list", url, "--json"))
    assert damaged["unfinished"] == ["step-00000006"]
    assert "state.json: it is not there" in damaged["checkpoints"][0]["error"]


def test_list_of_one_checkpoint_shows_that_one(nlscale: Nlscale, run: Path) -> None:
    found = read(nlscale("list", step_folder(run, 2), "--json"))
    assert [entry["step"] for entry in found["checkpoints"]] == [2]


def test_list_marks_what_cannot_be_read_and_goes_on(nlscale: Nlscale, run: Path) -> None:
    (step_folder(run, 2) / "state.json").write_text("{}")
    (run / "checkpoints" / "LATEST").unlink()
    found = read(nlscale("list", run, "--json"))
    broken, whole = found["checkpoints"]
    assert "state.json" in broken["error"] and broken["tokens"] is None
    assert whole["error"] is None and found["latest"] is None
    code, out, _ = nlscale("list", run)
    assert code == 0 and "broken" in out and "state.json" in out and "LATEST is missing" in out


def test_inspect_tells_progress_levels_and_tensors(nlscale: Nlscale, run: Path) -> None:
    found = read(nlscale("inspect", run, "--json"))
    assert found["path"] == str(step_folder(run, 6))
    assert (found["step"], found["tokens"], found["samples"]) == (6, 768, 48)
    assert found["layout"]["tensor"] == 2 and found["versions"]["torch"] == "2.13.0"
    fast, slow = found["levels"]
    assert (fast["period"], fast["updates"], fast["window_fill"]) == (1, 6, 0)
    # phase 0: two steps of four are in the window; phase 2: it has just been emptied
    assert (slow["period"], slow["groups"], slow["updates"]) == (4, 2, 1)
    assert slow["window_fill"] == 0.5 and slow["tokens"] == 2 * 128
    weights, moments = found["tensors"]["parameters"], found["tensors"]["optimizer"]
    assert moments == {key: 2 * count for key, count in weights.items()}
    assert weights["bytes"] == 4 * weights["elements"]
    assert found["tensors"]["windows"]["count"] == 1
    assert found["config"]["model.layers"] == 2
    # what the mixer's preset fills in, and a level's own defaults, are no news
    assert not any(key.startswith("model.memory.l") for key in found["config"])
    assert "levels.spectrum.1.hidden" not in found["config"]
    code, out, _ = nlscale("inspect", step_folder(run, 2))
    assert code == 0 and "step 2, 256 tokens, next sample 16" in out
    assert "4 ranks on 2 nodes, tensor 2, pipeline 1" in out and "model.layers: 2" in out
    assert max(len(line) for line in out.splitlines() if str(run) not in line) <= 80


def test_verify_reads_everything(nlscale: Nlscale, run: Path) -> None:
    assert nlscale("verify", run)[0] == 0
    assert read(nlscale("verify", run, "--json"))["broken"] == 0
    flip(step_folder(run, 6) / "__0_0.distcp", 2000)
    code, out, err = nlscale("verify", run)
    whole, broken, count = out.splitlines()
    assert (code, err) == (2, "")
    assert "whole" in whole and "step-00000002" in whole
    assert "broken" in broken and "__0_0.distcp was altered" in broken
    assert count == "1 of 2 broken"
    code, out, err = nlscale("verify", run, "--json")
    found = json.loads(out)
    assert (code, err, found["broken"]) == (2, "", 1)
    assert [entry["whole"] for entry in found["checkpoints"]] == [True, False]
    assert found["checkpoints"][0]["error"] is None
    assert nlscale("verify", step_folder(run, 2))[0] == 0
    assert nlscale("verify", step_folder(run, 6))[0] == 2


@pytest.mark.parametrize("name", [".metadata", "state.json", "manifest.json", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_verify_names_the_file_and_its_fault(
    nlscale: Nlscale, run: Path, name: str, damage: str
) -> None:
    path = step_folder(run, 6) / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        flip(path, 20)
    code, out, _ = nlscale("verify", run)
    line = next(line for line in out.splitlines() if line.startswith("broken"))
    assert code == 2 and name in line
    # a manifest that is cut short is one that is not as it was written
    expected = "altered" if (name, damage) == ("manifest.json", "truncated") else damage
    assert expected in line


def test_diff_of_equal_checkpoints_is_bitwise(nlscale: Nlscale, run: Path) -> None:
    found = read(nlscale("diff", run, step_folder(run, 6), "--json"))
    assert found["bitwise"] and found["max_relative_difference"] == 0
    assert {"parameters", "optimizer", "windows", "losses", "progress", "samples"} == set(
        found["classes"]
    )
    assert all(entry["bitwise"] for entry in found["classes"].values())
    assert found["config"] == found["layout"] == found["versions"] == found["data"] == {}
    code, out, _ = nlscale("diff", run, run)
    assert code == 0 and out.count("bitwise") == 6


def test_diff_names_what_differs_and_by_how_much(
    nlscale: Nlscale, run: Path, tmp_path: Path, tensors: Tensors
) -> None:
    name = "weights/embedding.weight"
    other = {key: tensor.clone() for key, tensor in tensors.items()}
    other[name] *= 1 + 1e-3
    other["weights/norm.weight"] *= 1 + 1e-5
    saved = state(6, config("optimizer.learning_rate=0.5"))
    saved["recent"][3] *= 1.01
    saved["levels"][1]["tokens"] += 1
    saved["samples"] += 1
    saved["layout"]["tensor"] = 1
    save(tmp_path / "other", 6, other, saved)
    found = read(nlscale("diff", tmp_path / "other", run, "--json"))
    classes = found["classes"]
    assert not found["bitwise"]
    assert classes["parameters"]["worst"] == name
    expected = pytest.approx(1e-3, rel=1e-3)
    assert classes["parameters"]["max_relative_difference"] == expected
    assert found["max_relative_difference"] == expected
    assert classes["optimizer"]["bitwise"] and classes["windows"]["bitwise"]
    assert classes["losses"]["worst"] == "recent"
    assert classes["losses"]["max_relative_difference"] == pytest.approx(0.01)
    assert classes["progress"]["differs"] == ["levels.1.tokens"]
    assert classes["samples"] == {"bitwise": False, "differs": ["samples"]}
    assert found["config"] == {"optimizer.learning_rate": [0.5, 0.001]}
    assert found["layout"] == {"tensor": [1, 2]}
    code, out, _ = nlscale("diff", tmp_path / "other", run)
    assert code == 0 and name in out and "0.001" in out and "levels.1.tokens" in out
    assert "optimizer.learning_rate: 0.5 -> 0.001" in out and "tensor: 1 -> 2" in out


def test_a_tensor_larger_than_a_box_is_compared_whole(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "_BOX", 100)  # three rows of 32
    other = {key: tensor.clone() for key, tensor in tensors.items()}
    name = "weights/embedding.weight"
    other[name][60, 31] += 0.5
    a, b = (save(tmp_path / side, 6, t) for side, t in (("a", other), ("b", tensors)))
    found = compare(a, b)["classes"]["parameters"]
    assert found["worst"] == name
    norm = tensors[name].double().norm().item()
    assert found["max_relative_difference"] == pytest.approx(0.5 / norm, rel=1e-6)


def differ(tmp_path: Path, a: Tensors, b: Tensors) -> dict[str, Any]:
    return compare(save(tmp_path / "a", 6, a), save(tmp_path / "b", 6, b))


def test_what_has_not_been_added_to_is_zero(tmp_path: Path, tensors: Tensors) -> None:
    window, moment = f"window/{SLOW}", "exp_avg/norm.weight"
    without = {key: t for key, t in tensors.items() if key not in (window, moment)}
    zeros = {**tensors, **{key: torch.zeros_like(tensors[key]) for key in (window, moment)}}
    assert differ(tmp_path, without, zeros)["bitwise"]
    assert differ(tmp_path, zeros, without)["bitwise"]
    for a, b in ((without, tensors), (tensors, without)):
        found = differ(tmp_path, a, b)["classes"]
        for kind, name in (("windows", window), ("optimizer", moment)):
            assert not found[kind]["bitwise"] and found[kind]["unlike"] == []
            assert (found[kind]["worst"], found[kind]["max_relative_difference"]) == (name, 1.0)
        assert found["parameters"]["bitwise"]


def test_a_parameter_that_one_side_lacks_is_no_zero(
    nlscale: Nlscale, tmp_path: Path, tensors: Tensors
) -> None:
    other = {key: t for key, t in tensors.items() if key != "weights/norm.weight"}
    other["weights/head.weight"] = torch.zeros(3, 5)
    for a, b in ((other, tensors), (tensors, other)):
        found = differ(tmp_path, a, b)
        parameters = found["classes"]["parameters"]
        assert not parameters["bitwise"] and math.isinf(found["max_relative_difference"])
        assert parameters["unlike"] == ["weights/head.weight", "weights/norm.weight"]
    found = read(nlscale("diff", tmp_path / "a", tmp_path / "b", "--json"))
    assert found["max_relative_difference"] is None
    _, out, _ = nlscale("diff", tmp_path / "a", tmp_path / "b")
    assert "another shape: weights/head.weight, weights/norm.weight" in out


def test_not_a_number_is_equal_only_to_itself(tmp_path: Path, tensors: Tensors) -> None:
    name = "weights/norm.weight"
    broken = {**tensors, name: torch.full_like(tensors[name], math.nan)}
    assert differ(tmp_path, broken, broken)["bitwise"]
    found = differ(tmp_path, tensors, broken)
    assert math.isinf(found["max_relative_difference"])
    assert found["classes"]["parameters"]["worst"] == name
    signed = {name: torch.zeros_like(tensors[name])}
    found = differ(tmp_path, signed, {name: -signed[name]})["classes"]["parameters"]
    assert not found["bitwise"] and found["max_relative_difference"] == 0
    assert found["worst"] == name


def test_windows_kept_node_by_node_are_compared_by_their_sum(
    tmp_path: Path, tensors: Tensors
) -> None:
    name = f"window/{SLOW}"
    half = {**{k: t for k, t in tensors.items() if k != name}}
    half |= {f"{name}@{node}": tensors[name] / 2 for node in range(2)}
    assert differ(tmp_path, half, tensors)["bitwise"]
    assert differ(tmp_path, half, half)["bitwise"]
    swapped = {**half, f"{name}@0": tensors[name], f"{name}@1": torch.zeros_like(tensors[name])}
    found = differ(tmp_path, half, swapped)["classes"]["windows"]
    # of one form, each node's is compared by itself: the sums are equal
    assert (found["worst"], found["max_relative_difference"]) == (f"{name}@1", 1.0)
    found = differ(tmp_path, {**half, f"{name}@1": tensors[name]}, tensors)["classes"]["windows"]
    assert (found["worst"], found["max_relative_difference"]) == (name, pytest.approx(0.5))


@pytest.mark.parametrize("verb", ["list", "inspect", "verify", "export"])
def test_a_folder_without_checkpoints_is_refused(
    nlscale: Nlscale, tmp_path: Path, verb: str
) -> None:
    rest = ["--to", "safetensors"] if verb == "export" else []
    assert "nowhere is not a folder" in refused(nlscale(verb, tmp_path / "nowhere", *rest))
    line = refused(nlscale(verb, tmp_path, *rest))
    assert f"no checkpoint in {tmp_path}" in line and "checkpoint.every" in line
    (tmp_path / "checkpoints" / "step-00000004.partial").mkdir(parents=True)
    line = refused(nlscale(verb, tmp_path, *rest))
    assert "no finished checkpoint" in line and "step-00000004.partial" in line
    line = refused(nlscale(verb, tmp_path / "checkpoints" / "step-00000004.partial", *rest))
    assert "not a finished checkpoint" in line


def test_diff_refuses_a_side_that_is_none(nlscale: Nlscale, run: Path, tmp_path: Path) -> None:
    assert "nowhere" in refused(nlscale("diff", run, tmp_path / "nowhere"))
    (step_folder(run, 6) / "manifest.json").unlink()
    assert "manifest.json is missing" in refused(nlscale("diff", run, step_folder(run, 2)))


def test_a_checkpoint_copied_to_another_name_is_one(
    nlscale: Nlscale, run: Path, tmp_path: Path
) -> None:
    step_folder(run, 6).rename(tmp_path / "kept")
    assert read(nlscale("inspect", tmp_path / "kept", "--json"))["step"] == 6
    assert Checkpoint(tmp_path / "kept", 6).state["step"] == 6
