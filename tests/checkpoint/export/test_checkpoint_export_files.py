"""An export's files that were put together wrongly, or on purpose."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nlscale.checkpoint.export.files import INDEX_FILE, SINGLE_FILE, opened, read_json
from nlscale.errors import UserError


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    """Whichever is read last would win: parts of two exports in one folder."""
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
    where = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match=r"two\.safetensors holds b, and so does"), opened(tmp_path):
        pass


@pytest.mark.parametrize("name", [SINGLE_FILE, "config.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is not a file"):
        if name == SINGLE_FILE:
            with opened(tmp_path):
                pass
        else:
            read_json(tmp_path / name)
