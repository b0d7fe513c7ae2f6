"""The folder for transformers: what is in it, who can load it, and the way back."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from checkpoint.export.huggingface_models import VOCABULARY, tokens
from checkpoint.export.test_checkpoint_export import TRAINED, start
from checkpoint.saved_runs import save, state
from data.corpora import lines, small
from generate.models import saved
from levels import level_runs
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import nlscale
from nlscale import cli
from nlscale.checkpoint.export import carried, registration
from nlscale.checkpoint.export.configuration import NlscaleConfig
from nlscale.checkpoint.export.huggingface import export_huggingface
from nlscale.checkpoint.export.registered import NlscaleForCausalLM
from nlscale.checkpoint.store.store import Checkpoint
from nlscale.config import recipe
from nlscale.data.tokenizer import (
    ByteTokenizer,
    SymbolTokenizer,
)
from nlscale.errors import UserError
from nlscale.model.decoder import Decoder
from nlscale.model.layers import megatron_config
from nlscale.model.mixers import table
from nlscale.model.mixers.memory.facts import MemoryFacts
from nlscale.parallel.alone import alone

LEVELS = "levels=[{name: quick}, {name: patient, period: 4 steps, hidden: 24}]"
METRICS = [
    {"kind": "validation", "step": 4, "loss": 3.25, "bits_per_byte": 1.5},
    {"kind": "validation", "step": 8, "loss": 2.5, "bits_per_byte": 1.25},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of a run that went on for two steps more, with records and a figure."""
    run = tmp_path_factory.mktemp("runs") / "small"
    found = saved(run, LEVELS)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in METRICS))
    (run / "loss.png").write_bytes(b"a figure")
    SymbolTokenizer("numbers", [f"w{i}" for i in range(VOCABULARY)]).save(run)
    return found


@pytest.fixture(scope="module")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "hf"
    export_huggingface(checkpoint, folder, tokenizer_folder=checkpoint.path.parents[1])
    return folder


def test_the_folder_holds_what_transformers_looks_for(exported: Path) -> None:
    names = ["README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors"]
    names += ["modeling_nlscale.py", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in exported.iterdir()) == names
    described = json.loads((exported / "config.json").read_text())
    assert described["architectures"] == ["NlscaleForCausalLM"]
    assert (described["model_type"], described["dtype"]) == ("nlscale", "float32")
    assert (described["eos_token_id"], described["step"], described["tokens"]) == (60, 6, 768)
    assert [(level["name"], level["period"]) for level in described["levels"]] == [
        ("quick", "1 step"),
        ("patient", "4 steps"),
    ]
    assert described["levels"][1]["parameters"] == [
        "blocks.*.cms.mlps.1.*",
        "blocks.*.cms.norms.1.*",
    ]
    assert described["nlscale"]["model"]["mixer"] == "hope"
    modes = {path.stat().st_mode & 0o777 for path in exported.iterdir()}
    assert modes == {exported.stat().st_mode & 0o666}


def test_the_card_says_what_was_trained_on_what(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for said in (
        "| patient | 4 steps | 24 | `blocks.*.cms.mlps.1.*`, `blocks.*.cms.norms.1.*` |",
        "| tokenizer | numbers, 61 ids |",
        "| tokens | 768 |",
        "| validation loss | 3.2500 nats a token, at step 4 |",  # step 8 it had not seen
        "| bits a byte | 1.5000, likewise |",
        "| training loss | 3.5000 nats a token, last step |",
        "model.d_model: 32",
        'from_pretrained("hf", trust_remote_code=True)',
        'tokenizer("w0"',
        "![loss](loss.png)",
    ):
        assert said in card, said
    assert (exported / "loss.png").read_bytes() == b"a figure"


ALONE = """
import sys
sys.modules["nlscale"] = None  # importing it is an error now
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, found = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["w1 w2 w3 w4 w5 w6 w7", "w8"], padding=True, return_tensors="pt")
torch.save((model(**inputs).logits[0], tokenizer.batch_decode(
    model.generate(**inputs, max_new_tokens=3), skip_special_tokens=True)), found)
"""


def test_transformers_runs_it_where_nlscale_is_not(exported: Path, tmp_path: Path) -> None:
    """The code that the folder carries; and the same text from the class that we register."""
    found = tmp_path / "found.pt"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, exported, found],
        env=environment, cwd=tmp_path, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    logits, texts = torch.load(found)
    prompt = torch.arange(1, 8)[None]
    ours = nlscale.load(exported, device="cpu").logits(prompt)
    torch.testing.assert_close(logits, ours[0], rtol=0, atol=1e-5)
    here = AutoModelForCausalLM.from_pretrained(exported)
    rest = here.generate(prompt, max_new_tokens=3)[0].tolist()
    assert texts[0] == " ".join(f"w{i}" for i in rest)
    assert texts[1].startswith("w8 ")


PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "export-to-hugging-face.md"


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what goes on from a copy of the state is what goes on from the text."""
    ByteTokenizer().save(tmp_path)
    found = saved(tmp_path / "run", "model.vocabulary=256")
    export_huggingface(found, tmp_path / "runs" / "hf", tokenizer_folder=tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    program = "\n".join(blocks).replace("max_new_tokens=200", "max_new_tokens=2")
    names: dict[str, Any] = {}
    exec(program.replace("max_new_tokens=20", "max_new_tokens=3, do_sample=False"), names)
    said = capsys.readouterr().out
    assert said.count("def read(path):") == 3
    again = names["model"].generate(names["both"], max_new_tokens=3, do_sample=False)
    assert torch.equal(again, names["output"])


def test_the_class_is_registered_where_nlscale_is_imported(exported: Path) -> None:
    registration.register_when_imported()  # once more, after transformers
    assert type(AutoConfig.from_pretrained(exported)).__module__.startswith("nlscale.")
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert isinstance(model, NlscaleForCausalLM)
    own = load_file(exported / "model.safetensors")
    assert model.state_dict().keys() == own.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_loads_in_both(tied: bool, exported: Path, tmp_path: Path) -> None:
    source = exported
    if tied:
        source = tmp_path / "tied"
        found = saved(tmp_path / "run", "model.tie_embeddings=true", "model.mixer=gated-delta")
        SymbolTokenizer("numbers", [f"w{i}" for i in range(VOCABULARY)]).save(tmp_path)
        export_huggingface(found, source, tokenizer_folder=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():  # as if it had been trained
        model.norm.weight += 0.5
    model.save_pretrained(tmp_path / "again")
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"config.json", "modeling_nlscale.py", "model.safetensors"} <= files
    x = tokens(2, 13)
    expected = model(x).logits.detach()
    once_more = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(once_more(x).logits, expected, rtol=0, atol=0)
    ours = nlscale.load(tmp_path / "again", device="cpu")
    torch.testing.assert_close(ours.logits(x), expected, rtol=0, atol=1e-5)
    half = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert half(x).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_come_back_in_fp32(exported: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    AutoModelForCausalLM.from_pretrained(exported, dtype=dtype).save_pretrained(tmp_path / "saved")
    ours, x = nlscale.load(tmp_path / "saved", device="cpu"), tokens(1, 9)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)(x)
    assert ours.logits(x).dtype == torch.float32
    torch.testing.assert_close(ours.logits(x), expected.logits.detach(), rtol=0, atol=1e-5)


def test_more_tokens_come_back_and_other_sizes_do_not(exported: Path, tmp_path: Path) -> None:
    model, folder, x = (
        AutoModelForCausalLM.from_pretrained(exported),
        tmp_path / "more",
        tokens(1, 9),
    )
    model.resize_token_embeddings(VOCABULARY + 3)
    model.save_pretrained(folder)
    expected = model(x).logits.detach()
    described = json.loads((folder / "config.json").read_text())
    del described["step"]  # as of a model that nothing was trained for
    (folder / "config.json").write_text(json.dumps(described))
    ours = nlscale.load(folder, device="cpu")
    torch.testing.assert_close(ours.logits(x), expected, rtol=0, atol=1e-5)
    levels = [{**level, "hidden": 8} for level in described["levels"]]
    for key, value in (
        ("num_hidden_layers", 3),
        ("levels", levels),
        ("mixer_options", {"heads": 1}),
    ):
        (folder / "config.json").write_text(json.dumps({**described, key: value}))
        with pytest.raises(UserError, match=rf"says {key}=.* under nlscale makes that .*"):
            nlscale.load(folder, device="cpu")


def test_a_model_from_a_new_configuration_is_saved_with_its_code(
    exported: Path, tmp_path: Path
) -> None:
    described = json.loads((exported / "config.json").read_text())
    expected = described.pop("auto_map")
    model = AutoModelForCausalLM.from_config(NlscaleConfig(**described))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == expected
    assert (tmp_path / "modeling_nlscale.py").exists()


def test_only_weights_that_are_missing_are_drawn(exported: Path, tmp_path: Path) -> None:
    folder, lacking = tmp_path / "lacking", "blocks.0.mixer.memory_key"
    shutil.copytree(exported, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    kept = {name: weight for name, weight in weights.items() if name != lacking}
    assert len(kept) == len(weights) - 1
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in kept.items():
        assert torch.equal(model.get_parameter(name), weight), name
    drawn = model.get_parameter(lacking).detach()
    torch.testing.assert_close(drawn @ drawn.mT, torch.eye(drawn.shape[-1]).expand_as(drawn))


def test_there_and_back_is_bit_identical(tmp_path: Path) -> None:
    """An export starts a run, whose weights exported again are the same file."""
    SymbolTokenizer("numbers", [f"w{i}" for i in range(32)]).save(tmp_path)
    of = level_runs.load(TRAINED)
    with alone():
        model = Decoder(of, megatron_config(of), 32)
    generator = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    drawn = {f"weights/{n}": torch.randn(s, generator=generator) for n, s in shapes.items()}
    described = {**state(6), "config": recipe.to_plain(of)}
    first, second = tmp_path / "first", tmp_path / "second"
    found = save(tmp_path / "run", 6, drawn, described)
    export_huggingface(found, first, tokenizer_folder=tmp_path)
    (begun,) = world.run(1, start, [], first)
    again = save(tmp_path / "more", 6, {f"weights/{n}": p for n, p in begun.items()}, described)
    export_huggingface(again, second, tokenizer_folder=tmp_path)
    for name in ("model.safetensors", "modeling_nlscale.py", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_several_files_with_an_index_load(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, tokenizer = tmp_path / "several", checkpoint.path.parents[1]
    written = export_huggingface(
        checkpoint, folder, tokenizer_folder=tokenizer, max_file_bytes=20_000
    )
    assert len(written.files) > 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    x = tokens(1, 9)
    ours = nlscale.load(folder, device="cpu").logits(x)
    torch.testing.assert_close(model(x).logits, ours, rtol=0, atol=1e-5)


def test_symbols_are_words_there_too(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer("w3  w1\nw2")["input_ids"] == [3, 1, 2]
    assert tokenizer.decode([3, 60, 1], skip_special_tokens=True) == "w3 w1"
    assert nlscale.load(exported, device="cpu").tokenizer.name == "numbers"
    with pytest.raises(Exception, match="UNK"):
        tokenizer("w99")
    padded = tokenizer(["w1 w2", "w3"], padding=True)
    assert padded["input_ids"][1] == [60, 3] and padded["attention_mask"][1] == [0, 1]


def test_the_carried_code_imports_torch_and_transformers_alone() -> None:
    for names in (["hope"], ["attention"], ["attention", "retnet", "hope"]):
        text = carried.modeling_source(names)
        assert text == carried.modeling_source(names)
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
        found = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in nodes
        }
        assert found - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_a_mixer_without_plain_torch_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Theirs(MemoryFacts):
        plain_by = None

    monkeypatch.setitem(table._TABLE, "hope", Theirs(modifies_itself=True, main_memory=True))
    with pytest.raises(UserError, match=r"mixer hope .*plain_by and plain_options.*safetensors"):
        export_huggingface(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_mixer_of_someone_else_is_carried_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the file beside it that it needs, before it; and nothing of a mixer that it is not."""
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "plain_half.py").write_text("HALF = 0.5  # of what there is\n")
    (package / "plain.py").write_text(
        "from math import pi\nfrom nlscale.model.plain import PlainMixer\n"
        "from theirs.plain_half import HALF\n\n\nclass Theirs(PlainMixer):\n"
        "    def forward(self, x, state, lengths):\n        return HALF * x / pi * pi, {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    class Facts(MemoryFacts):
        plain_by = "theirs.plain:Theirs"

    monkeypatch.setitem(table._TABLE, "hope", Facts(modifies_itself=True, main_memory=True))
    text = carried.modeling_source(["hope"])
    assert "class PlainMemory" not in text and "HALF = 0.5  # of what there is" in text
    names: dict[str, Any] = {"__name__": "carried"}
    exec(compile(text, "modeling_nlscale.py", "exec"), names)
    made = names["plain_mixer"]("hope")(), torch.ones(1, 2, 3)
    assert torch.equal(made[0](made[1], None, None)[0], torch.full((1, 2, 3), 0.5))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("from nlscale.ops.pointwise import swiglu", "cannot carry: a mixer in plain torch"),
        ("from .parts import Part", "in a way that a file cannot carry"),
        ("def wide(x): ...\nfrom nlscale.model.plain import State", "both define wide"),
    ],
)
def test_a_mixer_that_cannot_be_carried_is_refused(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain_theirs.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    class Theirs(MemoryFacts):
        plain_by = "plain_theirs:Theirs"

    monkeypatch.setitem(table._TABLE, "hope", Theirs(modifies_itself=True, main_memory=True))
    with pytest.raises(UserError, match=says):
        carried.modeling_source(["hope"])


def test_the_command(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["checkpoint", "export", str(checkpoint.path), *arguments])
        return ended.value.code, *capsys.readouterr()

    out, data = ["--out", str(tmp_path / "hf")], str(checkpoint.path.parents[1])
    code, _, err = export("--to", "huggingface", *out)
    assert code == 2 and "no tokenizer" in err and "--tokenizer" in err and err.count("\n") == 1
    code, _, err = export("--to", "safetensors", "--tokenizer", data, *out)
    assert code == 2 and "--tokenizer is for --to huggingface" in err
    ByteTokenizer().save(tmp_path)
    code, _, err = export("--to", "huggingface", "--tokenizer", str(tmp_path), *out)
    assert code == 2 and "256 ids and the model knows 61" in err and err.count("\n") == 1
    assert not (tmp_path / "hf").exists()
    given = ["--to", "huggingface", "--tokenizer", data, "--dtype", "bf16", "--json"]
    code, found, err = export(*given, *out)
    assert (code, err) == (0, "") and json.loads(found)["dtype"] == "bf16"
    code, _, err = export(*given, *out)
    assert code == 2 and "exists" in err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


def test_a_folder_of_another_tokenizer_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both say which it is."""
    (tmp_path / "in.jsonl").write_bytes(lines(["one", "two", "three"]))
    index = small([str(tmp_path / "in.jsonl")], tmp_path / "data")
    before, own = checkpoint.state, f"bytes sha256:{index['tokenizer_sha256']}"
    says = {"bytes sha256:12": rf"tokenizer bytes sha256:12, and .* holds that of {own}"}
    says[own] = "has 256 ids and the model knows 61"  # it is asked then whether it fits
    for trained, message in says.items():
        now = {**before, "data": {**before["data"], "tokenizer": trained}}
        monkeypatch.setattr(Checkpoint, "state", property(lambda self, now=now: now))
        with pytest.raises(UserError, match=message):
            export_huggingface(checkpoint, tmp_path / "no", tokenizer_folder=tmp_path / "data")


def test_the_card_says_which_tokenizer(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint.state
    data = {**before["data"], "tokenizer": f"numbers sha256:{'ab' * 32}"}
    monkeypatch.setattr(Checkpoint, "state", property(lambda self: {**before, "data": data}))
    run = checkpoint.path.parents[1]
    export_huggingface(checkpoint, tmp_path / "hf", tokenizer_folder=run)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"| tokenizer | numbers, 61 ids, sha256 {'ab' * 8} |" in card
