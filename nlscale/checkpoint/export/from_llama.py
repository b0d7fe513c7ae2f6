"""A Transformer that Hugging Face's classes have saved, Llama or Qwen, as an export of nlscale.

Its attention becomes the mixer `attention`, its MLPs the levels. Nothing in its folder is run: JSON
and safetensors hold data only.

The hidden units of an MLP do not see each other, so that it is the sum of k MLPs of a part of them
each. Those are the levels of `model.cms=independent`, which start with a weight of 1/k: with k
times the columns of W_down that are theirs the function is the same,

    W_down (SiLU(W_gate x) * W_up x) = sum_l 1/k (k W_down,l) (SiLU(W_gate,l x) * W_up,l x)

exactly where k is a power of two, else up to the rounding of k W_down. Rows of queries and keys
keep their order: in both models the halves of a head are rotated together, at the same wavelengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from nlscale.checkpoint.export.files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, opened, read_json
from nlscale.checkpoint.export.llama_config import config_from_llama
from nlscale.checkpoint.export.origin import ORIGIN, imported_from
from nlscale.checkpoint.export.weights import Exported, config_json, write_folder, write_json
from nlscale.checkpoint.store import files
from nlscale.config import recipe
from nlscale.config.vocabulary import Config, Dtype, head_dim, kv_heads
from nlscale.data.tokenizer import SETTINGS_NAME, TOKENIZER_NAME
from nlscale.errors import UserError
from nlscale.model.sizes import level_hidden

RECIPE_FILE = "recipe.yaml"
_HEAD = "lm_head.weight"
_UNUSED = ("rotary_emb.inv_freq",)
"""Ends of names of what old versions saved, and what follows from config.json."""
_DTYPES = {"BF16": Dtype.bf16, "F16": Dtype.fp32, "F32": Dtype.fp32}
_ALL = slice(None)


@dataclass(frozen=True)
class Part:
    """A part of one of their tensors."""

    name: str
    shape: tuple[int, ...]
    """Of the whole of it."""
    box: tuple[slice, ...] = (_ALL,)


@dataclass(frozen=True)
class Made:
    """One of our tensors: parts of theirs, one below the other, times a number; of none, zeros."""

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    factor: float = 1.0

    def read(self, tensors: dict[str, Any], dtype: torch.dtype) -> Tensor:
        """Its values."""
        if not self.parts:
            return torch.zeros(self.shape, dtype=dtype)
        read = torch.cat([tensors[part.name][part.box] for part in self.parts]).to(dtype)
        return read if self.factor == 1.0 else read * self.factor


def import_transformer(source: Path, folder: Path, periods: Sequence[str] = ("1",)) -> Exported:
    """Write the model as an export to a new folder, with a recipe that trains on from it.

    Memory: one file of weights, which safetensors may copy once.

    Args:
        source: with config.json and safetensors files, of `LlamaForCausalLM` or the like.
        folder: must not exist.
        periods: of the levels that share each MLP's hidden units, fastest first.

    Raises:
        UserError: the folder exists or cannot be written, or the model is none that ours can be.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; remove it or give another folder with --out")
    _check_files(source)
    described = read_json(source / CONFIG_FILE)
    with opened(source) as tensors:
        dtype = _dtype(tensors, source)
        headless = _HEAD not in tensors
        config = config_from_llama(described, source / CONFIG_FILE, headless, periods, dtype)
        made = dict(_made(config))
        _check_fit(made, tensors, source, config.model.tie_embeddings)
        of_run = {
            "step": 0,
            "tokens": 0,
            "versions": {name: version(name) for name in ("nlscale", "torch")},
            "imported": described,
            ORIGIN: imported_from(source, described),
        }

        def write_beside(partial: Path) -> None:
            plain = recipe.to_plain(config)
            write_json(partial / CONFIG_FILE, config_json(plain, dtype, of_run))
            files.write(partial / RECIPE_FILE, _recipe(plain, source, folder).encode())
            for name in (TOKENIZER_NAME, SETTINGS_NAME):
                if (source / name).is_file():
                    files.write(partial / name, (source / name).read_bytes())

        target = torch.bfloat16 if dtype == Dtype.bf16 else torch.float32
        return write_folder(
            folder,
            {name: of.shape for name, of in made.items()},
            dtype,
            lambda name: made[name].read(tensors, target),
            write_beside,
        )


def _check_files(source: Path) -> None:
    if not (source / CONFIG_FILE).is_file():
        raise UserError(f"no {CONFIG_FILE} in {source}; give a folder that transformers has saved")
    if not any((source / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise UserError(
            f"no {SINGLE_FILE} and no {INDEX_FILE} in {source}; pickles (.bin, .pt) are not read, "
            f"they can run code: let transformers load the model and save_pretrained it again"
        )


def _dtype(tensors: dict[str, Any], source: Path) -> Dtype:
    """That holds all weights as they are: bf16 only where all are."""
    found = {t.get_dtype() for t in tensors.values()}
    if not found or not found <= _DTYPES.keys():
        raise UserError(
            f"the weights in {source} are of {', '.join(sorted(found)) or 'no type'}; give a model "
            f"of {', '.join(_DTYPES)}, not a quantised one"
        )
    return Dtype.bf16 if found == {"BF16"} else Dtype.fp32


def _made(config: Config) -> Iterator[tuple[str, Made]]:
    """Our tensors by name, in the order of the model."""
    model, widths = config.model, level_hidden(config)
    assert model.vocabulary is not None
    d, size, levels = model.d_model, head_dim(model), len(widths)
    table, total = (model.vocabulary, d), sum(widths)
    yield "embedding.weight", _whole("model.embed_tokens.weight", *table)
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        yield f"{ours}.norm.weight", _whole(f"{theirs}.input_layernorm.weight", d)
        rows = {"q": model.heads * size, "k": kv_heads(model) * size, "v": kv_heads(model) * size}
        projected = tuple(Part(f"{attention}.{x}_proj.weight", (n, d)) for x, n in rows.items())
        yield f"{ours}.mixer.project.weight", Made(projected, (sum(rows.values()), d))
        yield f"{ours}.mixer.output.weight", _whole(f"{attention}.o_proj.weight", d, rows["q"])
        if model.attention.qk_norm:
            yield f"{ours}.mixer.query_norm.weight", _whole(f"{attention}.q_norm.weight", size)
            yield f"{ours}.mixer.key_norm.weight", _whole(f"{attention}.k_norm.weight", size)
        yield f"{ours}.cms.norms.0.weight", _whole(f"{theirs}.post_attention_layernorm.weight", d)
        for level, (first, last) in enumerate(pairwise(accumulate(widths, initial=0))):
            units, cms = slice(first, last), f"{ours}.cms.mlps.{level}"
            up = tuple(Part(f"{mlp}.{x}_proj.weight", (total, d), (units,)) for x in ("gate", "up"))
            yield f"{cms}.up.weight", Made(up, (2 * widths[level], d))
            down = Part(f"{mlp}.down_proj.weight", (d, total), (_ALL, units))
            yield f"{cms}.down.weight", Made((down,), (d, widths[level]), float(levels))
        if levels > 1:
            yield f"{ours}.cms.mixture", Made((), (levels,))
    yield "norm.weight", _whole("model.norm.weight", d)
    if not model.tie_embeddings:
        yield "head.weight", _whole(_HEAD, *table)


def _whole(name: str, *shape: int) -> Made:
    return Made((Part(name, shape),), shape)


def _check_fit(made: dict[str, Made], tensors: dict[str, Any], source: Path, tied: bool) -> None:
    """Refuse weights that are missing, of another shape, or of which nothing would be made."""
    expected = {part.name: part.shape for of in made.values() for part in of.parts}
    unused = {name for name in tensors if name.endswith(_UNUSED) or (tied and name == _HEAD)}
    for name in sorted(tensors.keys() - expected.keys() - unused):
        raise UserError(
            f"{source} holds {name}, for which nlscale's model has no place; it cannot be imported"
        )
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{source} holds no {name}; copy or save the model again")
        found = tuple(tensors[name].get_shape())
        if found != shape:
            raise UserError(
                f"{source}: {name} is {found}, and of its {CONFIG_FILE} it would be {shape}; copy "
                f"or save the model again"
            )


def _recipe(plain: dict[str, Any], source: Path, folder: Path) -> str:
    """What trains on from it, of the keys that are not their defaults."""
    del plain["data"]["dir"]
    defaults = recipe.to_plain(Config())
    changed = {
        section: {k: v for k, v in plain[section].items() if v != defaults[section][k]}
        for section in ("model", "data", "optimizer", "train")
    }
    spectrum = plain["levels"]["spectrum"]
    levels = [{key: level[key] for key in ("name", "period", "hidden")} for level in spectrum]
    run = {"dir": f"runs/{folder.name}-run", "weights": _path(folder)}  # not where the export lies
    kept = {"run": run, **changed, "levels": levels}
    text = yaml.safe_dump(kept, sort_keys=False, default_flow_style=False)
    return (
        f"# Trains on from {source.name}. Build data with its tokenizer, then:\n"
        f"#   nlscale train {folder / RECIPE_FILE} data.dir=DATA\n"
        f"# Paths are those of the folder in which that is called, as in every recipe.\n{text}"
    )


def _path(folder: Path) -> str:
    """From the working folder where it is inside it: both can be moved together then."""
    folder, here = folder.absolute(), Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
