"""The sources of a mixture: held against each other, weighed, and read in one order."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.mixtures import folder, mixed

from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.data import BatchReader, Samples
from nlscale.data.build import build
from nlscale.data.folders import open_folders
from nlscale.data.history import changed, gone_on, identity, ordered, without_names
from nlscale.data.mixture import Mixture
from nlscale.data.reader import MixtureReader
from nlscale.errors import UserError
from nlscale.train.mixed import readers_of

LENGTH = 24
WEIGHTS = {"web": 0.5, "code": 0.2, "books": 0.3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    folder(out, "web")
    folder(out, "code", documents=5)
    folder(out, "books", documents=8)
    rows = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}."} for n in range(60)]
    (out / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build([str(out / "sums.jsonl")], "bytes", out / "sums", held_out=0.2)
    return out


def sized(samples: int, *sources: str) -> Config:
    """A run on so many samples of a mixture, one a step."""
    of_run = (f"data.sequence_length={LENGTH}", f"train.steps={samples}", "train.global_batch=1")
    return mixed(*sources, overrides=(*of_run, "train.micro_batch=1"))


def reader(root: Path, *sources: str, samples: int = 500) -> tuple[MixtureReader, list[str]]:
    """What reads such a mixture, and the names of its sources by their places."""
    config = sized(samples, *sources)
    folders = open_folders(config.data)
    found = ordered(identity(folders, config, mixed=True), config)
    (mix,) = readers_of(found, folders)
    return mix, found.names


def test_a_row_is_the_sample_of_its_source_and_so_is_its_mask(root: Path) -> None:
    mix, names = reader(root, f"dir: {root}/web, weight: 3", f"dir: {root}/sums, weight: 2")
    rows, masks = mix.read(40, 30), mix.masks(40, 30)
    sources, samples = mix.order.take(40, 30)
    assert mix.sources(40, 30)[1] == 2 and (mix.sources(40, 30)[0] == sources).all()
    assert masks is not None and rows.shape == masks.shape == (30, LENGTH + 1)
    config = mixed(f"dir: {root}/web", f"dir: {root}/sums")
    splits = {each.name: Samples(each.train, LENGTH) for each in open_folders(config.data)}
    some = 0
    for row, mask, source, sample in zip(rows, masks, sources, samples, strict=True):
        split = splits[names[source]]
        assert (row == split[int(sample)]).all()
        own = split.mask(int(sample))
        assert (mask == (own if own is not None else True)).all()
        some += own is not None
    assert 0 < some < 30 and not masks.all()


def test_the_order_is_made_once_a_batch_and_ahead_only_for_what_is_fetched(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix, _ = reader(root, f"dir: {root}/web, weight: 3", f"dir: {root}/sums, weight: 2")
    asked, take = [], Mixture.take

    def taken(self: Mixture, first: int, count: int) -> Any:
        asked.append((first, count))
        return take(self, first, count)

    monkeypatch.setattr(Mixture, "take", taken)
    for first in (0, 8):
        mix.read(first, 8), mix.masks(first, 8), mix.sources(first, 8)
    assert asked == [(0, 8), (8, 8)]
    ahead = [(16, 4), (20, 4), (32, 4), (36, 4)]
    mix.expect(iter(ahead))
    assert len(asked) == 2
    soon: list[tuple[int, int]] = []
    splits = [each for each in mix._sources if each is not None]
    for split in splits:
        monkeypatch.setattr(split.shards, "expect", soon.extend)
    monkeypatch.setattr(mix, "_fetches", True)
    mix.expect(iter(ahead))
    assert asked[2:] == [(16, 8), (32, 8)]
    wanted = [sample for first, count in ahead for sample in take(mix.order, first, count)[1]]
    assert sorted(soon) == sorted((int(sample) * LENGTH, LENGTH + 1) for sample in wanted)


def test_a_mixture_of_one_reads_what_the_folder_alone_does(root: Path) -> None:
    mix, _ = reader(root, f"dir: {root}/web, weight: 0.3")
    (web,) = open_folders(recipe.load(None, [f"data.dir={root}/web"]).config.data)
    alone = BatchReader(Samples(web.train, LENGTH), 1234)
    for first, count in ((0, 9), (100, 64), (490, 10)):
        assert (mix.read(first, count) == alone.read(first, count)).all()
    assert mix.masks(0, 4) is None and alone.sources(0, 4) is None


def test_neither_places_nor_names_nor_folders_change_the_order(root: Path, tmp_path: Path) -> None:
    first, _ = reader(root, *(f"dir: {root}/{n}, weight: {w}" for n, w in WEIGHTS.items()))
    shutil.copytree(root / "code", tmp_path / "elsewhere")
    moved = [f"dir: {root}/{n}, weight: {w}" for n, w in WEIGHTS.items() if n != "code"]
    second, _ = reader(root, *moved[::-1], f"dir: {tmp_path}/elsewhere, weight: 0.2, name: other")
    assert (first.read(0, 300) == second.read(0, 300)).all()


def test_weights_that_are_not_given_are_tokens_to_the_power_of_the_temperature(root: Path) -> None:
    sources = [f"dir: {root}/{name}" for name in WEIGHTS]

    def weights(temperature: str) -> list[Fraction]:
        config = mixed(*sources, overrides=(f"data.temperature={temperature}",))
        return [each.weights[0] for each in open_folders(config.data)]

    tokens = [each.train.tokens for each in open_folders(mixed(*sources).data)]
    assert weights("1") == tokens and weights("0") == [1, 1, 1]
    assert [float(weight) for weight in weights("0.5")] == [n**0.5 for n in tokens]


@pytest.mark.parametrize("options", [{"tokenizer": "bpe:260"}, {"tokenizer": "bpe:258"}])
def test_sources_of_other_tokenizers_are_refused(
    root: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    other = folder(tmp_path, "code", **options)
    with pytest.raises(UserError) as refused:
        open_folders(mixed(f"dir: {root}/web", f"dir: {other}").data)
    said = str(refused.value)
    assert f"the tokenizer of {root}/web is bytes" in said
    assert f"{other} is {options['tokenizer']}" in said


def test_tokenizers_of_one_name_that_were_trained_apart_are_refused(tmp_path: Path) -> None:
    one, other = (folder(tmp_path, name, tokenizer="bpe:260") for name in ("web", "code"))
    with pytest.raises(UserError, match=f"tokenizer.json of {one} is not that of {other}"):
        open_folders(mixed(f"dir: {one}", f"dir: {other}").data)
    for data in (one, other):  # as an earlier version wrote it
        index = json.loads((data / "index.json").read_text())
        del index["tokenizer_sha256"]
        (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"tokenizer.json of {one} is not that of {other}"):
        open_folders(mixed(f"dir: {one}", f"dir: {other}").data)
    (other / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"cannot read {other}/tokenizer.json: No such file"):
        open_folders(mixed(f"dir: {one}", f"dir: {other}").data)


def test_data_are_mixed_once(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "web", tmp_path / "copy")
    with pytest.raises(UserError, match="hold the same data"):
        open_folders(mixed(f"dir: {root}/web", f"dir: {tmp_path}/copy").data)


def test_a_share_that_rounds_to_none_is_refused(root: Path) -> None:
    config = mixed(f"dir: {root}/web, weight: 1", f"dir: {root}/code, weight: 1e-6")
    with pytest.raises(UserError, match="the share of code is 1e-06"):
        identity(open_folders(config.data), config, mixed=True)


def told(root: Path, *sources: str) -> dict:
    config = sized(200, *sources)
    return identity(open_folders(config.data), config, mixed=True)


def test_what_counts_as_another_mixture(root: Path) -> None:
    web, code = f"dir: {root}/web, weight: 0.4", f"dir: {root}/code, weight: 0.2"
    first = told(root, web, code)
    same = told(root, f"dir: {root}/code, weight: 1, name: py", f"dir: {root}/web, weight: 2")
    assert changed(first, same) is None
    assert changed(first, told(root, web, f"{code}, epochs: 3")) == (
        "0.6667 web; 0.3333 code",
        "0.6667 web; 0.3333 code, at most 3 times",
    )
    before, now = changed(first, told(root, web, f"dir: {root}/books, weight: 0.2, name: code"))
    assert before != now and "code (" in before  # a source of that name, of other data
    of_one = recipe.load(None, [f"data.dir={root}/web"]).config
    alone = identity(open_folders(of_one.data), of_one, mixed=False)
    assert alone.keys() == {"fingerprint", "train_tokens", "tokenizer"}
    assert changed(alone, told(root, web)) is None
    assert changed(alone, first) == ("1 data", "0.6667 web; 0.3333 code")


def test_sources_that_are_read_no_more_are_told_apart(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "code", tmp_path / "web")
    shutil.copytree(root / "books", tmp_path / "other/web")
    config = sized(60, f"dir: {root}/web")
    data = told(root, f"dir: {root}/web")
    for number, now in enumerate((f"{tmp_path}/web", f"{tmp_path}/other/web", f"{root}/sums"), 1):
        data = gone_on(data, told(root, f"dir: {now}"), config, 10 * number, 10 * number)
    names = ordered(data, config).names
    assert len(set(names)) == 4 and "sums" in names
    assert sum(name.startswith("web-") for name in names) == 3


def test_data_are_the_same_whatever_the_last_parts_of_their_folders_are(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "code", tmp_path / "here")
    first, other = (
        told(root, f"dir: {root}/web", f"dir: {there}")
        for there in (root / "code", tmp_path / "here")
    )
    assert first != other and without_names(first) == without_names(other)
    heavier = told(root, f"dir: {root}/web, weight: 2", f"dir: {root}/code, weight: 1")
    assert without_names(heavier) != without_names(first)


def test_a_mixture_that_changes_goes_on_where_each_source_stood(root: Path) -> None:
    web, code = f"dir: {root}/web, weight: 3", f"dir: {root}/code, weight: 1"
    first = told(root, web, code)
    config = sized(200, web, code)
    other, last = told(root, f"dir: {root}/books, weight: 1", code), f"{code}, epochs: 40"
    second = gone_on(first, other, config, 50, 50)
    third = gone_on(second, told(root, web, last), config, 90, 90)
    assert gone_on(third, told(root, web, last), config, 120, 120) == third
    found = ordered(json.loads(json.dumps(third)), config)
    sources, samples = found.cuts[0].order.take(0, 200)
    names = np.array(found.names)[sources]
    assert set(names[:50]) == {"web", "code"} == set(names[90:])
    assert set(names[50:90]) == {"books", "code"}
    for place, name in enumerate(found.names):
        own = samples[sources == place].tolist()
        length = found.cuts[0].lengths[place]
        epochs = [own[i : i + length] for i in range(0, len(own), length)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs), name
    begun = ordered(first, config)
    before = begun.cuts[0].order.take(0, 50)
    firsts = {one: place for place, one in enumerate(begun.fingerprints)}
    assert [firsts[found.fingerprints[i]] for i in sources[:50]] == before[0].tolist()
    assert samples[:50].tolist() == before[1].tolist()
