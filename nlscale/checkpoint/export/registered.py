"""The class that transformers makes models of where nlscale is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nlscale.checkpoint.export import modeling
from nlscale.checkpoint.export.carried import AUTO_MAP, MODELING_FILE, modeling_source


class NlscaleForCausalLM(modeling.NlscaleForCausalLM):
    """The same as exports carry; what it saves carries it too."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        self.config.auto_map = dict(AUTO_MAP)  # one that was made anew has none
        super().save_pretrained(save_directory, *args, **kwargs)
        source = modeling_source(name for name, _ in self.config.mixers())
        (Path(save_directory) / MODELING_FILE).write_text(source, encoding="utf-8")
