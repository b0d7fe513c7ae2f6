"""Whose a mirror is, what may be its URL, and that it changes nothing of what a run is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest
from checkpoint.mirror.mirrors import DATA, config_of, saved, taken

from nlscale.checkpoint.mirror.check import check_mirror, probe_mirror
from nlscale.checkpoint.mirror.copy import Progress, copy
from nlscale.checkpoint.mirror.label import FILE, RUN, Label, TakenOver, take
from nlscale.checkpoint.mirror.remote import MirrorError, reason
from nlscale.checkpoint.same_run import changed_keys, check_same_run
from nlscale.checkpoint.store.store import Store
from nlscale.config import recipe
from nlscale.errors import UserError


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/mirror"


def _copied(label: Label, run_dir: Path, step: int) -> None:
    copy(saved(run_dir / "checkpoints", step), label.remote, Progress(step), lambda: None)


def test_a_run_goes_on_with_its_own(url: str, tmp_path: Path) -> None:
    first = taken(url, tmp_path / "a")
    _copied(first, tmp_path / "a", 1)
    again = taken(url, tmp_path / "a", "train.steps=2000")
    assert again.text == first.text and first.remote.read(RUN) == first.text
    again.check()


def test_another_run_is_refused_and_leaves_all_as_it_is(url: str, tmp_path: Path) -> None:
    first = taken(url, tmp_path / "a")
    for own in (None, "file://" + str(tmp_path / "elsewhere")):
        if own is not None:  # it has a mirror of its own, and changes to that of the first
            taken(own, tmp_path / "b", "optimizer.learning_rate=0.5")
        with pytest.raises(UserError) as error:
            taken(url, tmp_path / "b", "optimizer.learning_rate=0.5")
        lines = str(error.value).splitlines()
        assert lines[0].startswith(
            f"checkpoint.mirror {url} holds the checkpoints of another run of {tmp_path}/a on "
        )
        assert (
            "give this run a URL of its own, empty that one, or checkpoint.mirror=null" in lines[0]
        )
        assert (len(lines) > 1) == (own is None)  # the settings, where they are what tells
    assert first.remote.read(RUN) == first.text
    first.check()


def test_the_same_settings_in_a_folder_with_checkpoints_are_another_run(
    url: str, tmp_path: Path
) -> None:
    _copied(taken(url, tmp_path / "a"), tmp_path / "a", 1)
    saved(tmp_path / "b" / "checkpoints", 1, seed=2)
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        taken(url, tmp_path / "b")


def test_a_folder_that_was_brought_back_by_hand_goes_on(url: str, tmp_path: Path) -> None:
    _copied(taken(url, tmp_path / "a"), tmp_path / "a", 1)
    shutil.copytree(tmp_path / "mirror", tmp_path / "b" / "checkpoints")
    taken(url, tmp_path / "b").check()


def test_a_run_whose_folder_is_gone_takes_its_mirror_again(url: str, tmp_path: Path) -> None:
    first = taken(url, tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    second = taken(url, tmp_path / "a")
    second.check()
    # whoever still ran from the folder that is gone has been succeeded
    with pytest.raises(TakenOver, match=f"was taken over by {tmp_path}/a on "):
        first.check()


def test_the_settings_of_the_newest_checkpoint_count(url: str, tmp_path: Path) -> None:
    """They may have changed, with leave, since the run began."""
    label = taken(url, tmp_path / "a")
    checkpoint = saved(tmp_path / "a" / "checkpoints", 1)
    copy(checkpoint, label.remote, Progress(1), lambda: None)
    now = config_of(url, "optimizer.learning_rate=0.5")
    state = {"config": recipe.to_plain(now), "data": DATA, "step": 1}
    label.remote.write("step-00000001/state.json", json.dumps(state).encode())
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0\.5 -> "):
        taken(url, tmp_path / "b")
    taken(url, tmp_path / "b", "optimizer.learning_rate=0.5")


def test_a_mirror_that_was_emptied_is_labelled_again(url: str, tmp_path: Path) -> None:
    label = taken(url, tmp_path / "a")
    shutil.rmtree(tmp_path / "mirror")
    label.check()
    assert label.remote.read(RUN) == label.text


def test_damaged_labels_are_not_taken_for_ones_own(url: str, tmp_path: Path) -> None:
    label = taken(url, tmp_path / "a")
    label.remote.write(RUN, b"{")
    with pytest.raises(UserError, match="of another run"):
        taken(url, tmp_path / "a")
    label.remote.remove(RUN)
    (tmp_path / "a" / FILE).write_text("")
    taken(url, tmp_path / "a").check()


def test_no_mirror_is_asked_for_nothing(tmp_path: Path) -> None:
    config = config_of(None)
    check_mirror(config)
    probe_mirror(config)
    assert take(config, DATA, tmp_path, Store(tmp_path / "checkpoints")) is None
    assert list(tmp_path.iterdir()) == []


def test_it_is_the_same_run_with_another_mirror_or_none() -> None:
    """And one that was begun before there were mirrors."""
    plain = recipe.to_plain(config_of("s3://bucket/a"))
    for url in (None, "s3://bucket/b"):
        check_same_run(config_of(url), DATA, {"config": plain, "data": DATA, "step": 1}, "it")
    del plain["checkpoint"]["mirror"]
    assert changed_keys(config_of("s3://bucket/a"), plain) == {}


@pytest.mark.parametrize(
    "given",
    [
        "s3://key:se/cret@bucket/a",
        "sftp://me:secret@host/a",
        "https://store/a?signature=secret",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(
        UserError, match=r"^checkpoint\.mirror holds credentials.*~/\.aws/"
    ) as error:
        check_mirror(config_of(given))
    assert "cret" not in str(error.value).replace("AWS_SECRET_ACCESS_KEY", "")
    assert given not in str(error.value)


@pytest.mark.parametrize("given", ["/mnt/a", "s3://", "://a", "simplecache::s3://a/b", "s3://a\tb"])
def test_what_is_no_url_of_a_folder_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"is not a URL of a folder; give one such as s3://"):
        check_mirror(config_of(given))


def test_protocols_that_nobody_knows_or_whose_package_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match=r"mirror nope://a/b: unknown protocol nope://; give a URL"):
        check_mirror(config_of("nope://a/b"))
    with pytest.raises(UserError, match=r"package for gs:// is missing: .* install gcsfs"):
        check_mirror(config_of("gs://a/b"))

    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    what = r"package for s3:// is missing: pip install 'nlscale\[s3\]', on every node$"
    with pytest.raises(UserError, match=what):
        check_mirror(config_of("s3://a/b"))


def test_what_a_client_says_is_one_line_without_secrets() -> None:
    said = reason(OSError("GET https://me:secret@host/a?signature=secret\n  failed"))
    assert said == "GET https://host/a failed"
    assert len(reason(OSError("x" * 1000))) < 300


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^checkpoint.mirror: cannot .*; the bucket must exist"):
        probe_mirror(config_of(f"file://{tmp_path}/file/a"))
    with pytest.raises(MirrorError):
        taken(f"file://{tmp_path}/file/a", tmp_path / "run")
