"""Tokenizers of a tokenizer.json: what it says holds, and its separator ends documents only."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from data.corpora import lines

from nlscale.checkpoint.export.tokenizer import write_tokenizer
from nlscale.data import TokenShards
from nlscale.data.build import build
from nlscale.data.tokenizer import load_tokenizer, read_tokenizer
from nlscale.errors import UserError

CORPUS = ["the cat sat on the mat, the dog on the log. " * 20, "def f(x):\n    return x\n" * 20]
TEXTS = [*CORPUS, "naïve – 漢字 🙂", "a <|endoftext|> b", "<|im_end|>", "the [SEP] cat </s>"]


def byte_level() -> hf.Tokenizer:
    """A BPE with specials, one of which begins each text by the template of the file."""
    carrier = hf.Tokenizer(hf.models.BPE())
    carrier.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    carrier.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    carrier.train_from_iterator(CORPUS, trainer)
    carrier.post_processor = hf.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    carrier.add_tokens(["\n    ", "–"])  # not special: parts of a text
    return carrier


def wordpiece() -> hf.Tokenizer:
    carrier = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
    carrier.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    carrier.decoder = hf.decoders.WordPiece()
    specials = ["[UNK]", "[SEP]", "[PAD]"]
    trainer = hf.trainers.WordPieceTrainer(
        vocab_size=90, special_tokens=specials, show_progress=False
    )
    carrier.train_from_iterator(CORPUS, trainer)
    return carrier


def unigram() -> hf.Tokenizer:
    """Its model has </s> in its vocabulary, and makes it of a text that spells it."""
    carrier = hf.Tokenizer(hf.models.Unigram())
    carrier.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    carrier.decoder = hf.decoders.Metaspace()
    trainer = hf.trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    carrier.train_from_iterator(CORPUS, trainer)
    return carrier


def llama() -> hf.Tokenizer:
    """A BPE of characters, with bytes for others, that puts a space before each text."""
    carrier = hf.Tokenizer(hf.models.BPE(byte_fallback=True, unk_token="<unk>"))
    normalizers = [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
    carrier.normalizer = hf.normalizers.Sequence(normalizers)
    decoders = [
        hf.decoders.Replace("▁", " "),
        hf.decoders.ByteFallback(),
        hf.decoders.Fuse(),
        hf.decoders.Strip(" ", 1, 0),
    ]
    carrier.decoder = hf.decoders.Sequence(decoders)
    specials = ["<unk>", "<s>", "</s>"]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    carrier.train_from_iterator(CORPUS, trainer)
    made = json.loads(carrier.to_str())  # its bytes are no specials
    made["added_tokens"] = [t for t in made["added_tokens"] if t["content"] in specials]
    return hf.Tokenizer.from_str(json.dumps(made))


MADE: dict[str, tuple[Callable[[], hf.Tokenizer], str | None]] = {
    "bpe": (byte_level, None),
    "wordpiece": (wordpiece, "[SEP]"),
    "unigram": (unigram, "</s>"),
}


@pytest.fixture(params=MADE)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(folder: Path, kind: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    MADE[kind][0]().save(str(folder / "tok.json"))
    return folder / "tok.json"


def test_a_file_gives_the_ids_of_its_library(tmp_path: Path, kind: str) -> None:
    """Those of plain `tokenizers` without a template, for texts that spell no special token."""
    path = written(tmp_path, kind)
    tokenizer, plain = read_tokenizer(path, MADE[kind][1]), hf.Tokenizer.from_file(str(path))
    assert tokenizer.name == f"{kind}:{plain.get_vocab_size()}"
    assert tokenizer.separator == plain.token_to_id(MADE[kind][1] or "<|endoftext|>")
    for text in TEXTS[:3]:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == ids
        assert tokenizer.decode(ids) == plain.decode(ids, skip_special_tokens=False)
    for text in TEXTS:
        assert tokenizer.separator not in tokenizer.encode(text)
    assert tokenizer.encode_batch(TEXTS)[5].tolist() == tokenizer.encode(TEXTS[5]).tolist()


def test_ids_that_stand_for_bytes_give_every_text_back(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(written(tmp_path, "bpe"))
    lengths = tokenizer.byte_lengths()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())
    controlled = [tokenizer.encode("<|im_end|>").size, *read_ids(tmp_path, ["<|im_end|>"])]
    assert controlled[0] > 1  # letters, not the token
    assert tokenizer.text([controlled[1], *tokenizer.encode("a")]) == "a"
    assert tokenizer.decode([controlled[1]]) == "<|im_end|>" and lengths[controlled[1]] == 0


def read_ids(folder: Path, names: list[str]) -> list[int]:
    plain = hf.Tokenizer.from_file(str(folder / "tok.json"))
    return [plain.token_to_id(name) for name in names]


def test_the_separator_that_is_named(tmp_path: Path) -> None:
    """One that is asked for, then <|endoftext|>, then the eos_token beside the file."""
    path = written(tmp_path, "bpe")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"eos_token": "<|im_end|>"}')
    end, text_end = read_ids(tmp_path, ["<|im_end|>", "<|endoftext|>"])
    assert read_tokenizer(path).separator == text_end
    chosen = read_tokenizer(path, "<|im_end|>")
    assert chosen.separator == end
    for save in (chosen.save, lambda folder: write_tokenizer(chosen, folder)):  # and is kept
        folder = tmp_path / "saved"
        folder.mkdir(exist_ok=True)
        save(folder)
        assert load_tokenizer(folder).separator == end
    with pytest.raises(UserError, match=r"tok\.json: .*no token '</doc>'.*--separator"):
        read_tokenizer(path, "</doc>")
    other = written(tmp_path / "other", "wordpiece")
    with pytest.raises(UserError, match=r"no token '<\|endoftext\|>'"):
        read_tokenizer(other)
    (tmp_path / "other" / "tokenizer_config.json").write_text('{"eos_token": {"content": "[SEP]"}}')
    assert read_tokenizer(other).separator == read_tokenizer(other, "[SEP]").separator


def test_a_separator_that_the_file_takes_for_text_ends_documents_only(tmp_path: Path) -> None:
    """A token of the vocabulary, or an added one that is not special: text no longer becomes it."""
    path = written(tmp_path, "bpe")
    for end in ("–", "the"):
        tokenizer = read_tokenizer(path, end)
        assert tokenizer.separator not in tokenizer.encode(f"a {end} b{end}")
        assert tokenizer.decode(tokenizer.encode(f"a {end} b{end}")) == f"a {end} b{end}"
        tokenizer.save(tmp_path)
        assert tokenizer.separator not in load_tokenizer(tmp_path).encode(f"a {end} b{end}")


def test_an_unknown_token_that_is_the_separator_is_refused(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(written(tmp_path, "wordpiece"), "[UNK]")
    with pytest.raises(UserError, match=r"makes '\[UNK\]', its separator.*--separator"):
        tokenizer.encode("漢")


def test_the_vocabulary_is_rounded_up(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind)
    if kind == "bpe":  # ids with a gap between them
        described = json.loads(path.read_text())
        vocabulary = described["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = 400
        path.write_text(json.dumps(described))
        with pytest.raises(UserError, match=r"one of them is 400; .*--vocabulary-multiple"):
            read_tokenizer(path)
    tokenizer = read_tokenizer(path, MADE[kind][1], 128)
    assert tokenizer.vocabulary == (512 if kind == "bpe" else 128)
    known = tokenizer.known()
    assert known.sum() == hf.Tokenizer.from_file(str(path)).get_vocab_size()
    assert known.shape == tokenizer.byte_lengths().shape == (tokenizer.vocabulary,)
    assert not tokenizer.byte_lengths()[~known].any()
    ids = tokenizer.encode(CORPUS[0])
    assert known[ids].all() and tokenizer.dtype == (np.uint16 if kind == "bpe" else np.uint8)
    beyond = tokenizer.vocabulary - 1
    assert tokenizer.decode([*ids, beyond]) == tokenizer.decode(ids)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).vocabulary == tokenizer.vocabulary


def test_what_processes_hand_each_other_is_the_same(tmp_path: Path, kind: str) -> None:
    """The library's own pickle forgets that texts do not become special tokens."""
    tokenizer = read_tokenizer(written(tmp_path, kind), MADE[kind][1], 64)
    other = pickle.loads(pickle.dumps(tokenizer))
    assert (other.vocabulary, other.separator) == (tokenizer.vocabulary, tokenizer.separator)
    for text in TEXTS:
        assert np.array_equal(other.encode(text), tokenizer.encode(text))
    assert other.identity() == tokenizer.identity()


def test_the_identity_is_that_of_the_content(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind)
    tokenizer = read_tokenizer(path, MADE[kind][1])
    described = json.loads(path.read_text())
    merges = described["model"].get("merges", [])
    if merges:  # as other versions of the library write them
        described["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    described["truncation"] = None
    path.write_text(json.dumps(dict(reversed(described.items()))))
    assert read_tokenizer(path, MADE[kind][1]).identity() == tokenizer.identity()
    described["added_tokens"][0]["special"] = False
    path.write_text(json.dumps(described))
    assert read_tokenizer(path, MADE[kind][1]).identity() != tokenizer.identity()


def test_spans_of_ids_that_do_not_stand_for_bytes(tmp_path: Path, kind: str) -> None:
    """A token counts if one of its characters does, also where the text has other bytes."""
    tokenizer = read_tokenizer(written(tmp_path, kind), MADE[kind][1])
    text = "the cat sat on the mat"
    ids = tokenizer.encode(text)
    counted = tokenizer.counted(text, ((8, 11),), ids)
    assert counted.shape == (len(ids) + 1,) and not counted[-1]
    assert tokenizer.decode(ids[counted[:-1]]).strip() == "sat"
    spelled = "the cat [SEP] </s> sat"  # of which pieces are encoded by themselves
    ids = tokenizer.encode(spelled)
    counted = tokenizer.counted(spelled, ((len(spelled) - 3, len(spelled)),), ids)
    assert tokenizer.decode(ids[counted[:-1]]).strip() == "sat" and counted[-1]


def test_a_text_that_is_normalized_has_spans_too(tmp_path: Path) -> None:
    carrier = byte_level()
    carrier.normalizer = hf.normalizers.NFC()
    carrier.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "e\u0301 the cat"  # two characters become one
    ids = tokenizer.encode(text)
    counted = tokenizer.counted(text, ((7, 10),), ids)
    assert tokenizer.decode(ids[counted[:-1]]).strip() == "cat"


def test_data_of_a_file(tmp_path: Path, kind: str) -> None:
    """Built, moved, built again from what the build has kept; and without --separator refused."""
    path = written(tmp_path, kind)
    texts = [f"the cat sat {n} </s> [SEP] on the <|endoftext|> mat" for n in range(12)]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    options = {"held_out": 0.3, "separator": MADE[kind][1], "vocabulary_multiple": 512}
    source = [str(tmp_path / "a.jsonl")]
    index = build(source, f"file:{path}", tmp_path / "out", **options)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert index["vocabulary"] == tokenizer.vocabulary == 512
    assert index["tokenizer_sha256"] == tokenizer.identity()
    assert index["unigram_bits_per_byte"] > 0
    found = []
    for split in ("train", "validation"):
        shards = TokenShards(tmp_path / "out", split)  # reads what the index says
        ids = shards.read(0, shards.tokens)
        ends = np.flatnonzero(ids == index["separator"])
        assert len(ends) == index["splits"][split]["documents"] and ends[-1] == len(ids) - 1
        found += [part[:-1] for part in np.split(ids, ends + 1)[:-1]]
    expected = sorted(tokenizer.encode(text).tolist() for text in texts)
    assert sorted(part.tolist() for part in found) == expected
    shutil.move(path, tmp_path / "moved.json")
    again = build(source, f"file:{tmp_path / 'moved.json'}", tmp_path / "out", **options)
    assert again == index
    with pytest.raises(UserError, match="other sources or options"):
        build(
            source,
            f"file:{tmp_path / 'moved.json'}",
            tmp_path / "out",
            **{**options, "vocabulary_multiple": 1024},
        )


def test_a_bpe_that_is_trained_is_padded_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([f"{text}{n}" for n in range(9) for text in CORPUS]))
    source = [str(tmp_path / "a.jsonl")]
    index = build(source, "bpe:270", tmp_path / "out", held_out=0.3, vocabulary_multiple=128)
    assert (index["tokenizer"], index["vocabulary"]) == ("bpe:270", 384)
    few = build(source, "bpe:270", tmp_path / "few", held_out=0.3, bpe_sample=1000)
    assert few["tokenizer_sha256"] != index["tokenizer_sha256"]


@pytest.mark.parametrize(
    ("tokenizer", "options", "says"),
    [
        ("bytes", {"separator": "x"}, "bytes has a separator of its own"),
        ("bytes", {"vocabulary_multiple": 100}, "bytes has 256 ids, no multiple of 100"),
        ("bytes", {"bpe_sample": 9}, "--bpe-sample is for bpe:N"),
        ("bpe:300", {"separator": "x"}, "bpe:300 has a separator"),
        ("file:gone.json", {}, "no tokenizer at gone.json"),
    ],
)
def test_options_that_are_none_of_a_tokenizer(
    tmp_path: Path, tokenizer: str, options: dict[str, object], says: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["a", "b"]))
    with pytest.raises(UserError, match=says):
        build([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("nlscale_separator", 5), *[("nlscale_vocabulary", v) for v in ("x", 3, 1 << 40, True)]],
)
def test_settings_that_cannot_be(tmp_path: Path, key: str, value: object) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(UserError, match=r"tokenizer\.json: "):
        load_tokenizer(tmp_path)


def test_bytes_of_each_token_are_those_that_it_was_made_of(tmp_path: Path) -> None:
    """Also where ids stand for no bytes by themselves: together they are the text."""
    llama().save(str(tmp_path / "llama.json"))
    made = read_tokenizer(tmp_path / "llama.json", "</s>")
    ids = made.encode("the 漢a")
    assert made.decode(ids) == "the 漢a" and not made.byte_lengths().any()
    by_id = dict(
        zip(
            made.content()["model"]["vocab"].values(), made.content()["model"]["vocab"], strict=True
        )
    )
    spelled = [by_id[number] for number in ids.tolist()]
    assert spelled[-4:] == ["<0xE6>", "<0xBC>", "<0xA2>", "a"]
    sizes = made.sizes("the 漢a", ids)
    assert sizes[-4:].tolist() == [3, 0, 0, 1], "all of the character are the first one's"
    assert sizes[:-4].sum() == len("the ") and sizes.sum() == len("the 漢a".encode())
    for kind, (_, end) in MADE.items():
        tokenizer = read_tokenizer(written(tmp_path / kind, kind), end)
        for text in TEXTS:
            sizes = tokenizer.sizes(text, tokenizer.encode(text))
            assert sizes.sum() == len(text.encode()) and sizes.min() >= 0
    # tokens that were cut elsewhere
    letters = np.concatenate([made.encode(letter) for letter in "the cat"])
    assert len(letters) > len(made.encode("the cat"))
    assert made.sizes("the cat", letters).sum() == 7


@pytest.mark.parametrize("pack", [None, 32])
def test_packed_data_have_bits_per_byte(tmp_path: Path, pack: int | None) -> None:
    """Packing masks tokens, and those that count stand for bytes, whatever the tokenizer."""
    llama().save(str(tmp_path / "llama.json"))
    tokenizer = read_tokenizer(tmp_path / "llama.json", "</s>")
    texts = [f"the cat {number} sat – on the mat" for number in range(60)]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    given = f"file:{tmp_path}/llama.json"
    out = tmp_path / "out"
    index = build(
        [str(tmp_path / "a.jsonl")], given, out, held_out=0.3, separator="</s>", pack=pack
    )
    train = np.bincount(_targets(out, "train"), minlength=tokenizer.vocabulary) + 1
    for split in ("train", "validation"):
        shards, entry = TokenShards(out, split), index["splits"][split]
        size = entry["bytes"]
        if pack is not None:  # but for the first token of each sample: "▁the" and the like
            ids = shards.read(0, shards.tokens).astype(np.int64)
            firsts = [tokenizer.decode([number]) for number in ids[::pack].tolist()]
            size -= sum(len(text.encode()) for text in firsts)
            assert entry["counted_bytes"] == size
        assert shards.bytes_per_token == size / shards.counted_tokens > 1
    bits = -np.log2(train / train.sum())[_targets(out, "validation")].sum() / size
    assert index["unigram_bits_per_byte"] == pytest.approx(bits, rel=1e-12)


def _targets(out: Path, split: str) -> np.ndarray:
    shards = TokenShards(out, split)
    ids, mask = shards.read(0, shards.tokens), shards.read_mask(0, shards.tokens)
    return ids.astype(np.int64)[slice(None) if mask is None else mask]


def test_a_text_has_the_same_tokens_every_time(tmp_path: Path) -> None:
    """A file can ask for merges that are left out by chance (BPE dropout), for training."""
    path = written(tmp_path, "bpe")
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.5
    path.write_text(json.dumps(content))
    found, text = read_tokenizer(path), " ".join(CORPUS)
    first = found.encode(text)
    assert all(np.array_equal(found.encode(text), first) for _ in range(20))
    found.save(tmp_path)
    assert np.array_equal(load_tokenizer(tmp_path).encode(text), first)
