"""What a machine lacks for levels on a drive, or on its CPU, is said before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.ops import compiled
from nlscale.train import tiers_here

KEYS = [
    "data.dir=none", "model.layers=2", "model.d_model=64", "model.heads=4", "train.dtype=bf16",
    "levels=[{period: 1}, {period: 4, memory: nvme}]",
]  # fmt: skip


def check(folder: Path) -> None:
    config = recipe.load(None, [*KEYS, f"tiers.folder={folder}"]).config
    tiers_here.check_tiers_here(config, 256, 1)


def test_a_folder_is_refused_for_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"memory=nvme needs .*`nlscale doctor --build async_io`"):
        check(tmp_path)
    monkeypatch.setattr(compiled, "check", lambda name: {})
    check(tmp_path)
    with pytest.raises(UserError, match=r"is no folder on .*; make it on every node"):
        check(tmp_path / "none")
    with monkeypatch.context() as patched:
        patched.setattr(tiers_here, "file_system", lambda path: "nfs4")
        with pytest.raises(UserError, match=r"is on a network file system \(nfs4\); give"):
            check(tmp_path)
    with pytest.raises(UserError, match=r"free, and the ranks of a node put .* there; free some"):
        tiers_here.check_folder(tmp_path, 1e18)
    assert not [*tmp_path.iterdir()]
