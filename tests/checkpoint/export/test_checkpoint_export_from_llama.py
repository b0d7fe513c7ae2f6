"""Transformers of Hugging Face as ours: the same logits, also split over levels, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
import torch
import world
from generate.models import saved as trained
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config, Qwen3ForCausalLM

import nlscale
from nlscale import cli
from nlscale.checkpoint.export.from_llama import import_transformer
from nlscale.checkpoint.export.huggingface import export_huggingface
from nlscale.checkpoint.export.origin import beginning, imported_from, origin_of
from nlscale.checkpoint.restore import start_from_weights
from nlscale.config import recipe
from nlscale.data.tokenizer import SymbolTokenizer
from nlscale.errors import UserError

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(**other: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **other))


def qwen(**other: Any) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, **other))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(rope_theta=5e4, rms_norm_eps=1e-5),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "qwen3": lambda: qwen(tie_word_embeddings=False),
    "qwen3, tied": lambda: qwen(tie_word_embeddings=True),
}


def saved(model: Any, folder: Path) -> Path:
    """With weights large enough that every part of the model matters, and norms that are not 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else 0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each; only read."""
    torch.manual_seed(5)
    root = tmp_path_factory.mktemp("theirs")
    return {name: saved(make(), root / str(i)) for i, (name, make) in enumerate(MODELS.items())}


def logits_of(folder: Path, tokens: Tensor) -> Tensor:
    kind = qwen if "qwen3" in (folder / "config.json").read_text() else llama
    model = type(kind()).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


TOKENS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("periods", [["1"], ["1", "4", "16"]], ids=["whole", "levels"])
@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_has_its_logits(
    theirs: dict[str, Path], tmp_path: Path, name: str, periods: list[str]
) -> None:
    want = logits_of(theirs[name], TOKENS)
    assert want.std() > 0.5
    written = import_transformer(theirs[name], tmp_path / "ours", periods)
    model = nlscale.load(tmp_path / "ours", device="cpu")
    assert (model.logits(TOKENS) - want).abs().max() < 1e-5 * want.abs().max()
    spectrum = model.config.levels.spectrum
    assert sum(level.hidden or 0 for level in spectrum) == 88
    assert len(spectrum) == len(periods)
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert ("head.weight" in names) == ("tied" not in name)
    assert written.tensors == len(names)


def test_bf16_stays_bf16_and_fp16_is_kept_exactly(theirs: dict[str, Path], tmp_path: Path) -> None:
    for dtype, ours in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        folder = tmp_path / str(dtype)
        LlamaForCausalLM.from_pretrained(theirs["llama"], dtype=dtype).save_pretrained(folder)
        import_transformer(folder, folder / "ours", ["1", "2"])
        weights = load_file(folder / "ours" / "model.safetensors")
        assert {w.dtype for w in weights.values()} == {ours}
        down = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
        halves = [weights[f"blocks.1.cms.mlps.{level}.down.weight"] for level in (0, 1)]
        assert torch.equal(torch.cat(halves, 1), 2 * down.to(ours))


def started(recipe_file: Path) -> tuple[float, float]:
    """Losses of two steps on the same tokens, of a recipe on two tensor-parallel ranks."""
    from nlscale.levels.spectrum import spectrum
    from nlscale.parallel.layout import process_groups
    from nlscale.step.trainer import Trainer

    overrides = ["data.dir=none", "parallel.tensor=2", "train.global_batch=2", "train.steps=2"]
    overrides += ["data.sequence_length=39", "optimizer.warmup_steps=0"]
    config = recipe.load(recipe_file, overrides).config
    with process_groups(config) as layout:
        levels = spectrum(config.levels, 2 * 39)
        trainer = Trainer.build(config, layout, levels, VOCABULARY, draws=False)
        assert config.run.weights is not None
        start_from_weights(trainer, Path(config.run.weights))
        rows = [trainer.to_batch(row[None], 0, 1) for row in TOKENS.numpy().astype(np.int64)]
        first, second = (trainer.take_step(rows)[0].loss for _ in range(2))
    return first, second


def test_its_recipe_trains_on_from_it(
    theirs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the folder in which it lies was moved as a whole."""
    (tmp_path / "before").mkdir()
    monkeypatch.chdir(tmp_path / "before")
    source, out = theirs["qwen3, tied"], tmp_path / "before" / "ours"
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["checkpoint", "import", str(source), "--out", str(out), "--levels", "1, 4", "--json"]
        )
    assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recipe"] == str(out / "recipe.yaml") and said["dtype"] == "fp32"
    cli.checkpoint._print_import(said)
    assert said["tokenizer"] is None and "has no tokenizer.json" in capsys.readouterr().out
    for command, error in (
        (("generate", out), "the model has no tokenizer: the folder that it was imported from"),
        (("eval", "needle", out), "; name the folder of one with --tokenizer\n"),
        (("eval", "loss", out), "was imported, and has no data of its own; name text with --data"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*map(str, command)])
        assert error in capsys.readouterr().err
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path / "after")
    out = Path("ours")
    (first, second), _ = world.run(2, started, out / "recipe.yaml")
    logits = logits_of(source, TOKENS[:, :-1]).flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten()).item()
    assert first == pytest.approx(want, rel=1e-5) and second < first
    config = recipe.load(out / "recipe.yaml", ["data.dir=none"]).config
    assert [level.period for level in config.levels.spectrum] == ["1", "4"]


@pytest.mark.parametrize(
    ("periods", "said"),
    [
        ("4,1", "--levels 4,1: 1 is a shorter period than 4; fastest first"),
        ("1,fast", "--levels 1,fast: period 'fast' is not a duration; .* such as --levels 1,4,16"),
        ("1,,4", "--levels 1,,4: period '' is not"),
        ("1,2.5", "--levels 1,2.5: period '2.5' is not a whole number of steps"),
    ],
)
def test_periods_that_are_none_are_refused_by_what_was_typed(
    theirs: dict[str, Path], tmp_path: Path, periods: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        import_transformer(theirs["llama"], tmp_path / "ours", periods.split(","))
    assert not list(tmp_path.iterdir())


def test_a_card_names_what_was_imported_and_what_was_trained_since(
    theirs: dict[str, Path], tmp_path: Path
) -> None:
    """Also of a run that began with an export of such a run."""
    source = changed(theirs["llama"], tmp_path / "Their-1B")
    (source / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\nlicense: no\n")
    import_transformer(source, tmp_path / "ours")
    SymbolTokenizer("numbers", [f"w{i}" for i in range(61)]).save(tmp_path)
    for begun, run in (("ours", "first"), ("hf-first", "second")):
        checkpoint = trained(tmp_path / run, f"run.weights={tmp_path / begun}")
        export_huggingface(checkpoint, tmp_path / f"hf-{run}", tokenizer_folder=tmp_path)
        card = " ".join((tmp_path / f"hf-{run}" / "README.md").read_text().split())
        since = "for 6 steps on 768 tokens. It began with the weights of the folder"
        assert f"{since} `{begun}`" in card
        from_theirs = "imported from `Their-1B`, a `LlamaForCausalLM`; the steps and tokens are"
        assert from_theirs in card and "the imported folder states: `apache-2.0`." in card
    gone = beginning("runs/gone", origin_of("runs/gone"))
    assert gone.startswith(" It began with the weights of the folder `gone`;")
    assert beginning(None, {}) == ""
    assert imported_from(source, {"license": "mit"})["license"] == "mit"
    (source / "README.md").write_text("license: mit\n")
    assert imported_from(source, {}) == {"name": "Their-1B"}


def test_its_tokenizer_comes_along(theirs: dict[str, Path], tmp_path: Path) -> None:
    """Also one that ends texts by another token than ours."""
    source = tmp_path / "theirs"
    saved(llama(), source)
    carrier = hf.Tokenizer(hf.models.BPE())
    carrier.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    carrier.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<|begin|>", "<|end|>"], show_progress=False
    )
    carrier.train_from_iterator(["a word and another word"], trainer)
    carrier.save(str(source / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    import_transformer(source, tmp_path / "ours")
    model = nlscale.load(tmp_path / "ours", device="cpu")
    ids = model.encode("another word")
    assert model.decode(ids) == "another word" and model.tokenizer.separator == 1
    model.tokenizer.save(tmp_path)  # as `nlscale data build --tokenizer FOLDER` does
    assert nlscale.data.tokenizer.load_tokenizer(tmp_path).separator == 1


def changed(source: Path, folder: Path, **keys: Any) -> Path:
    """A copy whose config.json says something else."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    content = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **keys}))
    return folder


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"attention_bias": True}, "attention_bias=True asks for"),
        ({"mlp_bias": True}, "mlp_bias=True asks for"),
        ({"use_sliding_window": True}, "use_sliding_window=True asks for"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters=.* scales rotary"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling=.* scales"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"model_type": "qwen2"}, "model_type='qwen2' has biases"),
        ({"model_type": "mamba2"}, "model_type is 'mamba2'; what can be imported is llama, qwen3$"),
        ({"hidden_size": "many"}, "hidden_size is 'many'"),
        ({"num_key_value_heads": 3}, "model.heads 4 do not share model.attention.kv_heads 3"),
        ({"num_hidden_layers": 1}, "holds model.layers.1.*no place"),
        ({"num_hidden_layers": 3}, "holds no model.layers.2.input_layernorm.weight"),
        ({"intermediate_size": 96}, r"gate_proj.weight is \(88, 32\), and of its config.json"),
    ],
    ids=str,
)
def test_what_ours_cannot_be_is_refused(
    theirs: dict[str, Path], tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    source = changed(theirs["llama"], tmp_path / "theirs", **keys)
    with pytest.raises(UserError, match=said):
        import_transformer(source, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_swish_is_another_name_of_silu(theirs: dict[str, Path], tmp_path: Path) -> None:
    source = changed(theirs["llama"], tmp_path / "theirs", hidden_act="swish")
    assert import_transformer(source, tmp_path / "ours").tensors > 0


def test_biases_and_pickles_are_refused(theirs: dict[str, Path], tmp_path: Path) -> None:
    source = changed(theirs["llama"], tmp_path / "biased")
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model.layers.0.self_attn.q_proj.bias, .*no place"):
        import_transformer(source, tmp_path / "ours")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickles .* are not read, they can run code"):
        import_transformer(source, tmp_path / "ours")
    assert Qwen2Config().model_type == "qwen2"  # the name that is refused is theirs
