"""The model card of an export to Hugging Face: README.md, and the figures that it shows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nlscale.checkpoint.export.origin import ORIGIN, beginning
from nlscale.checkpoint.inspection import inspection
from nlscale.checkpoint.store.store import Checkpoint
from nlscale.config import trees
from nlscale.config.curriculum import lengths, of_plain
from nlscale.config.data_sources import folders_of
from nlscale.config.units import human_count
from nlscale.errors import UserError
from nlscale.telemetry.figures import METRICS_FILE, read_records

CARD_FILE = "README.md"
_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [nlscale, {tags}]
---

# {name}

A language model of {parameters} parameters, trained by nlscale {version} for {steps:,} steps on
{tokens} tokens.{beginning} Its sequence mixer is `{mixer}`; its feed-forward part is of {count}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

`trust_remote_code=True` runs `{modeling}` of this folder, which needs nothing but torch and
transformers. Where nlscale is imported it can be left out, as that registers the same class.
`nlscale train RECIPE run.weights={folder}` trains on from these weights.

## Levels

Each level is trained with a period of its own. Parameters are `{dtype}`.

{levels}

## Training

{training}

What the recipe says, where it is not a default (all of it is in `config.json` under `nlscale`):

```yaml
{recipe}
```

## Limits

A base model: it continues text like that which it was trained on, sequences of
{length:,} tokens. It follows no instructions, and nothing was done to make what it writes true or
harmless.
"""


def write_card(
    folder: Path, checkpoint: Checkpoint, described: dict[str, Any], facts: dict[str, str]
) -> None:
    """Write README.md and copy the figures of the run, where it has left any.

    Args:
        folder: of the export, still under another name.
        checkpoint: what is exported.
        described: what config.json holds.
        facts: `name` that the folder will have, its `parameters`, the `tokenizer`, a `prompt` that
            it knows, and the name of the file with the `modeling` code.
    """
    run = checkpoint.path.absolute().parent.parent
    figures = sorted(run.glob("*.png"))
    for figure in figures:
        shutil.copyfile(figure, folder / figure.name)
    own, state = described["nlscale"], checkpoint.state
    mixers = [entry["mixer"] for entry in described.get("pattern", [described])]
    rows = _training(checkpoint, run, facts["tokenizer"])
    table = _table(["", ""], [[what, text] for what, text in rows.items()])
    shown = "".join(f"\n\n![{figure.stem}]({figure.name})" for figure in figures)
    changed = {
        key: value
        for key, value in inspection(checkpoint)["config"].items()
        if value is not None or _is_set(own, key)
    }
    count = len(described["levels"])
    text = _CARD.format(
        name=run.name,
        folder=facts["name"],
        prompt=facts["prompt"],
        modeling=facts["modeling"],
        mixer="`, `".join(mixers),
        tags=", ".join(dict.fromkeys(mixers)),
        parameters=facts["parameters"],
        version=state["versions"].get("nlscale", "of unknown version"),
        steps=state["step"],
        tokens=human_count(state["tokens"]),
        beginning=beginning(own["run"].get("weights"), described.get(ORIGIN, {})),
        count=f"{count} levels" if count > 1 else "one level",
        dtype=described["dtype"],
        levels=_table(
            ["level", "period", "hidden units a block", "parameters"],
            [
                [level["name"], level["period"], f"{level['hidden']:,}", _code(level["parameters"])]
                for level in described["levels"]
            ],
        ),
        training=table + shown,
        recipe="\n".join(f"{key}: {trees.dump(value)}" for key, value in sorted(changed.items())),
        length=max(lengths(of_plain(own))),
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _digest(data: dict[str, Any]) -> str:
    """The sha256 of the tokenizer, where the data say it."""
    _, _, digest = str(data.get("tokenizer", "")).rpartition(" sha256:")
    return f", sha256 {digest[:16]}" if digest else ""


def _training(checkpoint: Checkpoint, run: Path, tokenizer: str) -> dict[str, str]:
    state = checkpoint.state
    data, optimizer = state["config"]["data"], state["config"]["optimizer"]
    folders = folders_of(data)
    tokens = state["data"].get("train_tokens")
    size = [] if tokens is None else [f"{human_count(tokens)} tokens"]
    rows = {
        "data": ", ".join([*(f"`{folder}`" for folder in folders), *size]),
        "tokenizer": tokenizer + _digest(state["data"]),
        "sequence length": ", then ".join(
            f"{length:,} tokens" for length in lengths(of_plain(state["config"]))
        ),
        "steps": f"{state['step']:,}",
        "tokens": f"{state['tokens']:,}",
        "optimizer": f"{optimizer['rule']}, learning rate {optimizer['learning_rate']:g}",
    }
    if state["last_losses"]:
        rows["training loss"] = f"{state['last_losses'][-1]:.4f} nats a token, last step"
    found = _validated(run, state["step"])
    if found is not None:
        bits = found.get("bits_per_byte")
        rows["validation loss"] = f"{found['loss']:.4f} nats a token, at step {found['step']:,}"
        rows["bits a byte"] = "" if bits is None else f"{bits:.4f}, likewise"
    return {what: text for what, text in rows.items() if text}


def _validated(run: Path, step: int) -> dict[str, Any] | None:
    """The last validation up to that step of which the run still has a record."""
    if not (run / METRICS_FILE).exists():  # a checkpoint by itself
        return None
    try:
        records = read_records(run)
    except UserError as error:
        raise UserError(f"the model card wants the losses of the run: {error}") from None
    of = [r for r in records if r.get("kind") == "validation" and r["step"] <= step]
    of = [r for r in of if r.get("loss") is not None]
    return of[-1] if of else None


def _is_set(config: Any, key: str) -> bool:
    """Whether the run knew that key, which a later version may have brought."""
    for part in key.split("."):
        try:
            config = config[int(part) if isinstance(config, list) else part]
        except (KeyError, TypeError):
            return False
    return True


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(names: str | list[str]) -> str:
    return names if isinstance(names, str) else ", ".join(f"`{name}`" for name in names)
