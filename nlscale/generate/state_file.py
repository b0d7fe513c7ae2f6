"""A sequence that a model has read, kept in a file to go on from: a conversation, a book.

The file is safetensors: the tensors of the stream, which tokens occur, and as metadata what model
and tokenizer they are of. Nothing that is read from it is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nlscale.config.fields import path_of
from nlscale.config.vocabulary import mixer_label
from nlscale.data.tokenizer import TOKENIZER_NAME, Tokenizer
from nlscale.errors import UserError
from nlscale.generate.model import Model
from nlscale.generate.text import Begun, Rows

_FORMAT = "nlscale state 1"
_STREAM, _SEEN = "stream/", "seen"
_SAMPLED = 256
"""Values of each weight that tell one model from another."""
_ALWAYS = {
    f"{section}.{key}"
    for section, keys in {
        "model": (
            "mixer layers d_model heads cms hidden vocabulary tie_embeddings rope_base norm_eps "
            "init_std mup_base_width"
        ),
        "model.memory": (
            "chunk convolution lambda_init anchored c normalize_value separate_inputs "
            "static_gates output_gate read_norm eta_bias alpha_bias"
        ),
        "model.attention": "kv_heads head_dim qk_norm",
        "levels": "spectrum stagger learning_rate_rule reduction",
        "levels.spectrum": "name period parts hidden learning_rate optimizer wire local",
        "levels.spectrum.outer": "every momentum learning_rate",
        "levels.period_warmup": "steps critical_batch share cooldown",
    }.items()
    for key in keys.split()
}
"""Keys that are in a digest whatever they are, as when there were no others. One that is not here
is in it where it is not at its default, so that a key that is added refuses no file of before."""


class Learning(Protocol):
    """What is asked of a `nlscale.generate.learner.Learner`."""

    @property
    def context(self) -> str: ...

    def stream_from(self, tensors: Mapping[str, Tensor]) -> Rows: ...


@dataclass(frozen=True)
class Facts:
    """What a state is of; what can be said of it before the model is there."""

    model: str
    """Digest of the configuration, the step and the weights."""
    described: str
    """Mixer and step, for a person."""
    dtype: str
    tokenizer: str
    """Its digest."""
    tokens: int
    """Of the sequence."""
    recent: list[int]
    """The last ids of it."""
    context: str = ""
    """What levels have learned from it by, as JSON; "": nothing."""


def facts_of(path: str | Path) -> Facts:
    """What a state file says of itself.

    Raises:
        UserError: it cannot be read, or is none.
    """
    path = path_of(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is not a file; name one for the state")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is no state that --state has saved: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise UserError(f"{path} is no state that --state has saved; name another file")
    try:
        facts = Facts(**json.loads(metadata["facts"]))
        if not facts.recent or not all(type(token) is int for token in facts.recent):
            raise ValueError("it has no last token")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}; read the text anew") from None
    return facts


def load(path: str | Path, model: Model, learner: Learning | None = None) -> Begun:
    """The sequence in a state file, on the model's device.

    Args:
        path: of the file.
        model: that has read the sequence.
        learner: of the model, where levels are to go on learning from it; None: none does.

    Raises:
        UserError: as `facts_of`; or it is of another model, dtype or tokenizer, or levels have
            learned from it by other keys.
    """
    path = path_of(path)
    facts = facts_of(path)
    if facts.dtype != str(model.dtype):
        raise UserError(
            f"{path} is a state in {facts.dtype}, and the model is in {model.dtype}; take the "
            f"model that it was made with, or another file"
        )
    if facts.model != digest(model):
        raise UserError(
            f"{path} is a state of another model ({facts.described}), not of {_described(model)}; "
            f"name the run or checkpoint that it was made with, or another file"
        )
    if facts.tokenizer != _digest_of(model.tokenizer):
        raise UserError(
            f"{path} is a state of text of another tokenizer than {model.tokenizer.name}; give the "
            f"one that it was made with (--tokenizer)"
        )
    if facts.context != (learner.context if learner else ""):
        raise UserError(
            f"{path} is a state from which levels learned by {facts.context or 'nothing'}, and now "
            f"they would by {learner.context if learner else 'nothing'}; give the same --context, "
            f"or another file"
        )
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        seen = tensors.pop(_SEEN).cpu().bool()
        stream = (learner or model).stream_from(
            {n.removeprefix(_STREAM): t for n, t in tensors.items()}
        )
        begun = Begun(stream, facts.recent, seen)
        if seen.shape != (model.vocabulary,) or begun.tokens != facts.tokens:
            raise ValueError("its tensors and what it says of them differ")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; read the text anew") from None
    return begun


def save(path: str | Path, begun: Begun, model: Model) -> None:
    """Write a state; the file is the old one or the new one, whole.

    Raises:
        UserError: it cannot be written.
    """
    path = path_of(path)
    facts = Facts(
        digest(model), _described(model), str(model.dtype), _digest_of(model.tokenizer),
        begun.tokens, begun.recent, begun.stream.context,
    )  # fmt: skip
    tensors: dict[str, Tensor] = {_SEEN: begun.seen.to(torch.uint8)}
    for name, tensor in begun.stream.tensors().items():
        tensors[_STREAM + name] = tensor.detach().cpu().contiguous()
    partial = path.with_name(f".partial-{path.name}")
    try:
        metadata = {"format": _FORMAT, "facts": json.dumps(vars(facts))}
        save_file(tensors, partial, metadata=metadata)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}") from None
    finally:
        partial.unlink(missing_ok=True)


def _described(model: Model) -> str:
    return f"{mixer_label(model.config.model)}, step {model.step}"


def digest(model: Model) -> str:
    """Of what a state depends on: the same for a run and for its export in the same dtype."""
    sections = {
        "model": _counted(model.config.model, "model"),
        "levels": _counted(model.config.levels, "levels"),
    }
    config = json.dumps(sections, sort_keys=True, default=str)
    found = hashlib.sha256(f"{config}\n{model.step}\n".encode())
    for name, weight in model._decoder.named_parameters():
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(len(flat), _SAMPLED), dtype=torch.float64)
        some = flat[places.long().to(flat.device)].to("cpu", torch.float64)
        found.update(f"{name} {tuple(weight.shape)}\n".encode() + some.numpy().tobytes())
    return found.hexdigest()


def _counted(section: Any, path: str) -> dict[str, Any]:
    """Its keys that tell models apart: `_ALWAYS`, and those that are not at their defaults; a
    section without any is left out."""
    found: dict[str, Any] = {}
    for each in fields(section):
        value, key = getattr(section, each.name), f"{path}.{each.name}"
        if is_dataclass(value):
            if inner := _counted(value, key):
                found[each.name] = inner
        elif key in _ALWAYS or value != _default(each):
            found[each.name] = _plain(value, key)
    return found


def _plain(value: Any, key: str) -> Any:
    """The same of what may be a list of sections."""
    if not isinstance(value, list):
        return value
    return [_counted(item, key) if is_dataclass(item) else item for item in value]


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _digest_of(tokenizer: Tokenizer) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return hashlib.sha256((Path(folder) / TOKENIZER_NAME).read_bytes()).hexdigest()
