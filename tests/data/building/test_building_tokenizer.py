"""The tokenizer of a build is that of the file when it began, with what lies beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers as hf
from data.building.builds import contents, corpus, units

from nlscale.data.build import begun
from nlscale.data.building.share import STEPS, share
from nlscale.data.building.work import Work
from nlscale.data.index import INDEX_NAME, UNITS_NAME
from nlscale.data.sources import find_files, fingerprint
from nlscale.errors import UserError

OPTIONS = {"held_out": 0.2, "shard_tokens": 700, "block_tokens": 100, "max_lost": 0.5}


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A byte-level tokenizer with two tokens that could end a text, the first of which is named."""
    carrier = hf.Tokenizer(hf.models.BPE())
    carrier.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    carrier.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>", "<|im_end|>"],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    carrier.train_from_iterator(["a text of a few words"], trainer)
    folder = tmp_path / "given"
    folder.mkdir()
    carrier.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def test_another_separator_beside_the_file_is_another_build(tmp_path: Path, given: Path) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    before = units(sources, out, str(given))
    assert units(sources, out, str(given)) == before
    (given / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(UserError, match="other sources or options"):
        units(sources, out, str(given))
    after = units(sources, out, str(given), overwrite=True)
    assert (before["separator"], after["separator"]) == (0, 1)
    # it decides nothing of a build that names the token itself
    named = units(sources, tmp_path / "named", str(given), separator="</s>")
    (given / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert units(sources, tmp_path / "named", str(given), separator="</s>") == named


def test_a_folder_of_a_version_that_did_not_compare_it_is_up_to_date(
    tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the separator that its index has is another one."""
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("nlscale.data.building.asked.decided_beside", lambda *_: False)
        earlier = units(sources, out, str(given))
    assert units(sources, tmp_path / "new", str(given))["fingerprint"] != earlier["fingerprint"]
    assert units(sources, out, str(given)) == earlier
    (given / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(UserError, match="other sources or options"):
        units(sources, out, str(given))


def test_a_file_that_changes_while_it_waits_is_not_read_again(tmp_path: Path, given: Path) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    units(sources, tmp_path / "whole", str(given))
    assert isinstance(begun(sources, str(given), out, unit_bytes=2500, **OPTIONS), Work)
    (given / "tokenizer.json").unlink()
    (given / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    for step in STEPS:
        share(out, step, 1, 1, workers=1)
    assert contents(out) == contents(tmp_path / "whole")


def test_what_the_fingerprint_of_plain_text_is_made_of_stays(tmp_path: Path) -> None:
    """Folders of earlier versions are up to date as long as it does."""
    sources = corpus(tmp_path / "in")
    index = units(sources, tmp_path / "out")
    asked = [1, "bytes", 0.2, 7, 100, 0, {"unit_bytes": 2500}]
    assert index["fingerprint"] == fingerprint(find_files(sources).files, asked)


@pytest.mark.parametrize("damage", ["form", "missing", "[", "[]"])
def test_a_plan_that_is_not_known_is_begun_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    assert isinstance(begun(sources, "bytes", out, unit_bytes=2500, **OPTIONS), Work)
    path = out / UNITS_NAME / "plan.json"
    plan = json.loads(path.read_bytes())
    if damage == "missing":  # as plans were before they had a form
        del plan["form"]
    plan |= {"form": 99} if damage == "form" else {}
    path.write_text(damage if damage.startswith("[") else json.dumps(plan))
    (out / UNITS_NAME / "left").touch()
    with pytest.raises(UserError, match="nothing is being built"):
        share(out, "survey", 1, 1, workers=1)
    units(sources, out, progress=True)
    assert "its plan is damaged, or of another version" in capsys.readouterr().err
    assert (out / INDEX_NAME).exists()
