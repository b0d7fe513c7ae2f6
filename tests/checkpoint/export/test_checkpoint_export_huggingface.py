"""The class of transformers against our own model: the same numbers, however it is asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from checkpoint.export.huggingface_models import (
    PADDING,
    VOCABULARY,
    Pair,
    configuration,
    pair,
    tokens,
)
from transformers import DynamicCache

from nlscale.checkpoint.export.modeling import CACHE, NlscaleForCausalLM
from nlscale.errors import UserError
from nlscale.model.init import initialize
from nlscale.parallel.alone import alone

MIXERS = ["hope", "hope-pure", "hope-paper", "gated-delta", "attention"]
GROUPED = ["model.mixer=attention", "model.attention.kv_heads=1", "model.attention.qk_norm=true"]
GROUPED += ["model.attention.head_dim=8", "model.tie_embeddings=true"]
WRITES = "model.memory={write: decayed, strength: 2}"
ATOL = 1e-5
made = cache(pair)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for each other at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of(mixer: str) -> Pair:
    return made(*GROUPED) if mixer == "grouped" else made(f"model.mixer={mixer}")


def same_logits(models: Pair) -> None:
    x = tokens(2, 27)  # six chunks and a part of one
    with torch.no_grad():
        found = models.exported(x).logits
    torch.testing.assert_close(found, models.logits(x), rtol=0, atol=ATOL)


@pytest.mark.parametrize("width", ["null", "16"])
@pytest.mark.parametrize("cms", ["sequential", "independent"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_logits_are_ours(mixer: str, cms: str, width: str) -> None:
    same_logits(pair(f"model.mixer={mixer}", f"model.cms={cms}", f"model.mup_base_width={width}"))


@pytest.mark.parametrize(
    "options",
    [
        ["model.memory.output_gate=false", "model.memory.c=1"],
        ["model.memory.read_norm=false", "model.memory.separate_inputs=false"],
        ["model.memory.static_gates=false", "model.memory.normalize_value=false"],
        ["model.memory.anchored=false", "model.memory.convolution=1"],
        [WRITES, "model.memory.query_convolution=true", "model.memory.separate_inputs=false"],
        [WRITES, "model.memory.gate_activation=sigmoid", "model.mixer=gated-delta"],
        [WRITES, "model.mixer=hope-pure"],
        ["levels=[1]", "model.cms=independent", "model.layers=1", "model.memory.chunk=64"],
        ["levels=[{parts: [head]},{parts: [cms, mixer]},{parts: [cms, norms]}]"],
        GROUPED,
        ["model.mixer=attention", "model.rope_base=100", "model.attention.kv_heads=2"],
        ["model.tie_embeddings=true", "model.mup_base_width=16"],
        [
            "model.layers=4",
            "model.attention.window=5",
            "model.pattern=[hope,sliding-window,retnet]",
        ],
    ],
    ids=lambda options: options[-1],
)
def test_logits_are_ours_with_options(options: list[str]) -> None:
    same_logits(pair(*options))


@pytest.mark.filterwarnings("ignore:.*checkpointing_(enable|disable):FutureWarning")
@pytest.mark.parametrize("mixer", [*MIXERS, "grouped"])
def test_gradients_are_ours(mixer: str) -> None:
    """Ours are worked out by hand, these are autograd's; checkpointing changes none."""
    models, x = of(mixer), tokens(2, 14)
    models.native.zero_grad()
    with alone():
        models.native(x[:, :-1], x[:, 1:]).mean().backward()
    expected = {name: p.grad for name, p in models.native.named_parameters()}
    exported = models.exported.train()
    for checkpointing in (False, True):
        exported.gradient_checkpointing_enable() if checkpointing else None
        exported.zero_grad()
        exported(x, labels=x).loss.backward()
        found = {name: p.grad for name, p in exported.named_parameters()}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * scale)
    exported.gradient_checkpointing_disable()
    exported.eval()


@pytest.mark.parametrize("mixer", [*MIXERS, "grouped"])
@torch.no_grad()
def test_pieces_give_what_the_whole_gives(mixer: str) -> None:
    models, x = of(mixer), tokens(2, 30)
    found, state, at = [], None, 0
    for size in (9, 1, 1, 6, 1, 1, 1, 1, 1, 8):
        output = models.exported(x[:, at : at + size], **{CACHE: state}, use_cache=True)
        found.append(output.logits)
        state, at = output[CACHE], at + size
    whole = models.exported(x).logits
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=ATOL)


@pytest.mark.parametrize("mixer", [*MIXERS, "grouped"])
@torch.no_grad()
def test_a_padded_row_is_what_it_is_alone(mixer: str) -> None:
    """Wherever the padding stands, in each of two pieces; a piece of it alone changes nothing."""
    models = of(mixer)
    generator = torch.Generator().manual_seed(3)
    x, lengths = tokens(4, 40), [25, 24, 7, 0]
    standing = torch.zeros(4, 40, dtype=torch.long)
    for row, length in enumerate(lengths):
        chosen = torch.randperm(40, generator=generator)[:length]
        standing[row, chosen] = 1
    standing[0] = torch.arange(40) >= 15  # as a tokenizer pads
    found, state = [], None
    for piece in (slice(0, 26), slice(26, 27), slice(27, 40)):
        given = {CACHE: state, "attention_mask": standing[:, piece]}
        output = models.exported(x[:, piece], **given, use_cache=True)
        found.append(output.logits)
        state = output[CACHE]
    logits = torch.cat(found, 1)
    assert logits.isfinite().all()
    for row, length in enumerate(lengths):
        own = standing[row].bool()
        if length:
            alone = models.exported(x[row : row + 1, own]).logits[0]
            torch.testing.assert_close(logits[row, own], alone, rtol=0, atol=ATOL)


@pytest.mark.parametrize("mixer", ["hope", "hope-pure", "gated-delta", "attention"])
@torch.no_grad()
def test_greedy_is_ours_over_200_tokens(mixer: str) -> None:
    models, prompt = pair(f"model.mixer={mixer}", "model.layers=1"), tokens(1, 5)
    found = models.exported.generate(prompt, max_new_tokens=200, do_sample=False)
    ours, states, read = prompt, None, 0
    with alone():
        while ours.shape[1] < 205:
            x, states = models.native.hidden(ours[:, read:], states)
            read = ours.shape[1]
            ours = torch.cat([ours, models.native.logits(x[-1:])[0].argmax(-1, True)], 1)
    assert torch.equal(found, ours)


@pytest.mark.parametrize("mixer", ["hope", "grouped"])
@torch.no_grad()
def test_batches_beams_and_samples(mixer: str) -> None:
    models, x = of(mixer), tokens(2, 11)
    padded = torch.full((2, 16), PADDING)
    padded[0, 5:], padded[1, 9:] = x[0], x[1, :7]
    given = {"attention_mask": (padded != PADDING).long(), "max_new_tokens": 9}
    greedy = {"do_sample": False}
    for how in (greedy, {**greedy, "num_beams": 3}):
        together = models.exported.generate(padded, **given, **how)
        for row, alone_ in ((0, x[:1]), (1, x[1:, :7])):
            one = models.exported.generate(alone_, max_new_tokens=9, **how)
            assert torch.equal(together[row, 16:], one[0, alone_.shape[1] :])
    # beams go on from states that were reordered; without a cache all is read again
    again = models.exported.generate(padded, **given, **greedy, num_beams=3, use_cache=False)
    assert torch.equal(together, again)
    torch.manual_seed(0)
    drawn = models.exported.generate(
        padded, **given, do_sample=True, top_k=20, num_return_sequences=3
    )
    assert len({tuple(row.tolist()) for row in drawn}) == 6
    torch.manual_seed(0)
    same = models.exported.generate(
        padded, **given, do_sample=True, top_k=20, num_return_sequences=3
    )
    assert torch.equal(drawn, same)


@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache() -> None:
    models, x = of("hope"), tokens(1, 9)
    kept = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    first = models.exported.generate(x, **kept)
    more = torch.cat([first.sequences, tokens(1, 4, seed=1)], 1)
    on = models.exported.generate(more, **{CACHE: first[CACHE]}, **kept)
    assert torch.equal(on.sequences, models.exported.generate(more, **kept).sequences)
    with pytest.raises(ValueError, match="the cache has read"):
        models.exported.generate(x, **{CACHE: on[CACHE]}, **kept)


@torch.no_grad()
def test_what_else_forward_takes() -> None:
    exported, x = of("hope").exported, tokens(2, 9)
    whole = exported(x, output_hidden_states=True)
    assert [h.shape for h in whole.hidden_states] == [(2, 9, 32)] * 3
    by_vectors = exported(inputs_embeds=exported.embedding(x), logits_to_keep=1)
    torch.testing.assert_close(by_vectors.logits, whole.logits[:, -1:], rtol=0, atol=ATOL)
    labels = torch.where(torch.arange(9) < 4, -100, x)
    expected = torch.nn.functional.cross_entropy(
        whole.logits[:, 3:-1].reshape(-1, VOCABULARY), x[:, 4:].reshape(-1)
    )
    assert float(exported(x, labels=labels).loss) == pytest.approx(float(expected), abs=1e-6)
    assert exported(x, use_cache=False).get(CACHE) is None
    with pytest.raises(ValueError, match="attention_mask of shape"):
        exported(x, attention_mask=torch.ones(2, 1, 9, 9))


@torch.no_grad()
def test_packed_rows_are_refused_and_padded_ones_are_not() -> None:
    exported, x = of("hope").exported, tokens(2, 9)
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    padded = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)  # as transformers counts them
    plain = exported(x, attention_mask=mask).logits
    assert torch.equal(exported(x, attention_mask=mask, position_ids=padded).logits, plain)
    assert exported(x, position_ids=torch.arange(9)[None]).logits.isfinite().all()
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    for given in ({"position_ids": packed}, {"seq_idx": packed}):
        with pytest.raises(ValueError, match="pad instead, or split the rows"):
            exported(x[:1], **given)
    with pytest.raises(ValueError, match="pad instead, or split the rows"):
        exported.generate(x[:1], position_ids=packed, max_new_tokens=2)
    with pytest.raises(ValueError, match="position_ids of shape"):
        exported(x, position_ids=torch.arange(8)[None])
    greedy = {"attention_mask": mask.flip(1), "max_new_tokens": 4, "do_sample": False}
    cached, again = (exported.generate(x, **greedy, use_cache=use) for use in (True, False))
    assert torch.equal(cached, again)


def test_a_cache_of_another_kind_is_refused() -> None:
    exported, x = of("hope").exported, tokens(1, 5)
    with pytest.raises(ValueError, match="a cache of DynamicCache cannot hold the state"):
        exported.generate(x, **{CACHE: DynamicCache()}, max_new_tokens=2)
    with pytest.raises(ValueError, match="a cache of DynamicCache cannot hold the state"):
        exported(x, **{CACHE: DynamicCache()})


@pytest.mark.parametrize("mixer", ["hope", "hope-pure", "grouped"])
@torch.no_grad()
def test_a_new_model_begins_as_ours_does(mixer: str) -> None:
    overrides = GROUPED if mixer == "grouped" else [f"model.mixer={mixer}"]
    overrides = [*overrides, "model.mup_base_width=16"]
    native = pair(*overrides).native
    with alone():
        initialize(native, 5, 0, 1)
    torch.manual_seed(0)
    new = NlscaleForCausalLM(configuration(*overrides)).eval()
    for name, parameter in native.named_parameters():
        found = new.get_parameter(name)
        if float(parameter.std()) > 0 and not name.endswith("alpha_bias"):
            few = 4 / math.sqrt(parameter.numel())
            assert float(found.std()) == pytest.approx(float(parameter.std()), rel=few), name
        else:
            torch.testing.assert_close(found, parameter)
    x = tokens(2, 20)
    assert float(new(x, labels=x).loss) == pytest.approx(math.log(VOCABULARY), abs=0.1)


@torch.no_grad()
def test_stronger_writes_in_pieces_and_token_by_token_are_those_of_the_whole() -> None:
    models, x = pair(WRITES, "model.memory.query_convolution=true"), tokens(2, 12)
    state, found = None, []
    for size in (5, 1, 1, 1, 4):
        at = sum(y.shape[1] for y in found)
        output = models.exported(x[:, at : at + size], **{CACHE: state}, use_cache=True)
        found.append(output.logits)
        state = output[CACHE]
    torch.testing.assert_close(torch.cat(found, 1), models.logits(x), rtol=0, atol=ATOL)


def test_what_plain_torch_does_not_say_is_refused() -> None:
    with pytest.raises(UserError, match=r"reads_state .* safetensors"):
        pair("model.memory.reads_state=true")
