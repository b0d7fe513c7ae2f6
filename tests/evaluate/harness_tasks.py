"""Small tasks of lm-evaluation-harness with data on the disk, and models to ask them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generate.models
import pytest

from nlscale.data.tokenizer import ByteTokenizer

DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    # Contexts of several lengths; answers of several lengths, one of them a single token.
    "choice": [
        {"q": f"What comes {'long ' * (n % 4)}after {n}?", "a": [str(n + 1), "x", "nobody knows"]}
        for n in range(11)
    ],
    # No context, and twice the same.
    "sentences": [{"a": [f"The {n % 4} sat.", f"The sat {n % 4}"]} for n in range(5)],
    "pages": [{"page": " ".join(str(i * i % (n + 7)) for i in range(5 + 9 * n))} for n in range(6)],
    "say": [{"q": f"{'Well, ' * (n % 3)}say {n}:", "a": "e"} for n in range(5)],
}
_HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
output_type: {kind}
"""
TASKS = {
    "choice": (
        "multiple_choice",
        "fewshot_split: train\ndoc_to_text: 'Q: {{q}}\\nA:'\ndoc_to_choice: a\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    ),
    "sentences": (
        "multiple_choice",
        "num_fewshot: 0\ndoc_to_text: ''\ndoc_to_choice: a\ndoc_to_target: 0\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n",
    ),
    "pages": (
        "loglikelihood_rolling",
        "doc_to_text: ''\ndoc_to_target: '{{page}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    ),
    "say": (
        "generate_until",
        "doc_to_text: '{{q}}'\ndoc_to_target: a\nmetric_list: [{metric: exact_match}]\n"
        "generation_kwargs: {until: [e, '\\n\\n'], max_gen_toks: 12}\n",
    ),
    "sampled": (
        "generate_until",
        "doc_to_text: '{{q}}'\ndoc_to_target: a\nmetric_list: [{metric: exact_match}]\nrepeats: 3\n"
        "generation_kwargs: {until: [], max_gen_toks: 8, do_sample: true, temperature: 1.0}\n",
    ),
}
GROUP = """group: both
task: [choice, sentences]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def write_tasks(folder: Path) -> None:
    """NAME.yaml and NAME.jsonl of each task, and a group both.yaml."""
    for name, documents in DOCUMENTS.items():
        lines = (json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, (kind, rest) in TASKS.items():
        data = folder / f"{name if name in DOCUMENTS else 'say'}.jsonl"
        head = _HEAD.format(name=name, data=data, kind=kind)
        (folder / f"{name}.yaml").write_text(head + rest)
    (folder / "both.yaml").write_text(GROUP)


def save_model(folder: Path, mixer: str) -> Any:
    """A checkpoint in `folder`/`mixer` of a tiny model that reads bytes."""
    (folder / "data").mkdir(exist_ok=True)
    ByteTokenizer().save(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.models, "VOCABULARY", 256)
        keys = (f"data.dir={folder / 'data'}", f"model.mixer={mixer}", "model.vocabulary=256")
        return generate.models.saved(folder / mixer, *keys)
