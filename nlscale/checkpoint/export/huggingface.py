"""A checkpoint as a folder of Hugging Face: weights, configuration, tokenizer, code and card.

The weights are those of `nlscale.checkpoint.export.weights`, tensor for tensor, and config.json
holds the run's configuration too, so that nlscale loads the folder like any other export. Writing
it takes no transformers; `nlscale.checkpoint.export.modeling` is what that makes of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nlscale.checkpoint.export.card import write_card
from nlscale.checkpoint.export.carried import AUTO_MAP, MODELING_FILE, modeling_source
from nlscale.checkpoint.export.class_keys import class_keys
from nlscale.checkpoint.export.files import CONFIG_FILE
from nlscale.checkpoint.export.origin import ORIGIN
from nlscale.checkpoint.export.tokenizer import write_tokenizer
from nlscale.checkpoint.export.weights import (
    HUGGING_FACE,
    MAX_FILE_BYTES,
    Exported,
    config_of,
    describe,
    export,
)
from nlscale.checkpoint.store.store import Checkpoint
from nlscale.config.in_context import in_context
from nlscale.config.units import human_count
from nlscale.config.vocabulary import Config, ContextObjective, Dtype, mixers_of
from nlscale.data.index import INDEX_NAME, read_index, tokenizer_of
from nlscale.data.tokenizer import Tokenizer, load_tokenizer
from nlscale.errors import UserError
from nlscale.model.mixers.table import plain_mixer
from nlscale.model.sizes import level_parameters

GENERATION_FILE = "generation_config.json"
_PROMPT = "The "


def export_huggingface(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: Dtype | None = None,
    tokenizer_folder: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Verify a checkpoint and write the folder that transformers loads, all or nothing.

    Args:
        checkpoint: of any layout.
        folder: must not exist.
        dtype: of the weights; None: that in which the model was trained.
        tokenizer_folder: with the tokenizer that it was trained with; None: its data's.
        max_file_bytes: size of a file of weights, as `export` takes it.

    Raises:
        UserError: as `export`; or the mixer has nothing in plain torch, or a level changes inside
            the context; or there is no tokenizer.
        CheckpointError: the checkpoint is broken.
    """
    own = describe(checkpoint, dtype)
    config = config_of(own, checkpoint.path)
    names = mixers_of(config.model)
    for name in names:
        plain_mixer(name)  # refuses one that there is not
    if changing := in_context(config, ContextObjective.local):
        raise UserError(
            f"levels.spectrum.{changing[0].level}.context: what changes inside the context has "
            f"nothing in plain torch, of which an export to Hugging Face is made; export with --to "
            f"safetensors"
        )
    source = modeling_source(names)
    _refuse_another_tokenizer(checkpoint, tokenizer_folder or Path(config.data.folders()[0]))
    tokenizer = _tokenizer(config, tokenizer_folder)
    assert config.model.vocabulary is not None
    count = sum(level_parameters(config, config.model.vocabulary))

    def write(partial: Path) -> None:
        special = {f"{kind}_token_id": tokenizer.separator for kind in ("bos", "eos", "pad")}
        described = {**described_for(own, config), **special}
        _write_json(partial / CONFIG_FILE, described)
        _write_json(partial / GENERATION_FILE, special)
        write_tokenizer(tokenizer, partial)
        (partial / MODELING_FILE).write_text(source, encoding="utf-8")
        facts = {
            "name": folder.name,
            "parameters": human_count(count),
            "tokenizer": f"{tokenizer.name}, {tokenizer.vocabulary:,} ids",
            "prompt": _prompt(tokenizer),
            "modeling": MODELING_FILE,
        }
        write_card(partial, checkpoint, described, facts)

    return export(checkpoint, folder, dtype, max_file_bytes, write)


def described_for(own: dict[str, Any], config: Config) -> dict[str, Any]:
    """What config.json holds, but for the tokens: what the class is made of, and our own.

    Args:
        own: `nlscale.checkpoint.export.weights.describe`.
        config: of that.
    """
    return {
        "architectures": ["NlscaleForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": HUGGING_FACE,
        "dtype": own["torch_dtype"],
        **class_keys(config),
        **{key: own[key] for key in ("step", "tokens", "versions", "nlscale")},
        **({ORIGIN: own[ORIGIN]} if ORIGIN in own else {}),
    }


def _refuse_another_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Where a data folder says which tokenizer it is of, by a UserError; others say nothing."""
    trained = checkpoint.state.get("data", {}).get("tokenizer")
    if trained is None or not (folder / INDEX_NAME).is_file():
        return
    there = tokenizer_of(read_index(folder))
    if there is not None and there != trained:
        raise UserError(
            f"{checkpoint.path} was trained with the tokenizer {trained}, and {folder} holds that "
            f"of {there}; give the one that it was trained with by --tokenizer"
        )


def _tokenizer(config: Config, folder: Path | None) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(folder or config.data.folders()[0])
    except UserError as error:
        raise UserError(f"{error}, and give it with --tokenizer") from None
    assert config.model.vocabulary is not None
    if tokenizer.vocabulary > config.model.vocabulary:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocabulary} ids and the model knows "
            f"{config.model.vocabulary}; give the one that it was trained with by --tokenizer"
        )
    return tokenizer


def _prompt(tokenizer: Tokenizer) -> str:
    """Something to begin with, for an example."""
    try:
        tokenizer.encode(_PROMPT)
    except UserError:  # symbols, which are no text
        return tokenizer.decode([0])
    return _PROMPT


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
