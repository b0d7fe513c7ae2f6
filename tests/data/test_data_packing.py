"""Documents packed whole into samples: against plain best fit over lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.corpora import small

from nlscale.data import Samples, TokenShards
from nlscale.data.packing import MOST_WINDOW_TOKENS, Packer, best_fit, window_of
from nlscale.errors import UserError

SEPARATOR = 0


def slow_best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Best-fit decreasing, looking at every bin for every piece."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    bins: list[list[int]] = []
    for number in order:
        best = None
        for candidate, inside in enumerate(bins):
            room = size - sum(lengths[other] for other in inside)
            if room >= lengths[number] and (best is None or room < best[0]):
                best = room, candidate
        if best is None:
            bins.append([number])
        else:
            bins[best[1]].append(number)
    return sorted(sorted(inside) for inside in bins)


def slow_pack(
    documents: list[list[int]], masks: list[list[bool]], size: int, window: int
) -> list[tuple[list[int], list[bool]]]:
    """The samples, over lists."""
    samples = []
    held: list[tuple[list[int], list[bool]]] = []

    def pack() -> None:
        for numbers in slow_best_fit([len(ids) for ids, _ in held], size):
            ids = [token for number in numbers for token in held[number][0]]
            counts = [counted for number in numbers for counted in held[number][1]]
            ids += [SEPARATOR] * (size - len(ids))
            counts += [False] * (size - len(counts))
            samples.append((ids, [False, *counts[1:]]))
        held.clear()

    for ids, mask in zip(documents, masks, strict=True):
        for i in range(0, len(ids), size):
            piece = ids[i : i + size], [mask[i] and not i, *mask[i + 1 : i + size]]
            held += [piece] if not i or piece[0] != [SEPARATOR] else []
        if sum(len(piece) for piece, _ in held) >= window:
            pack()
    pack()
    return samples


def drawn(
    random: np.random.Generator, count: int, longest: int
) -> tuple[list[list[int]], list[list[bool]]]:
    """Documents with their separators, and masks of them."""
    documents = [
        [*random.integers(1, 100, random.integers(0, longest)).tolist(), SEPARATOR]
        for _ in range(count)
    ]
    masks = [(random.random(len(ids)) < 0.7).tolist() for ids in documents]
    return documents, masks


def packed(
    packer: Packer, documents: list[list[int]], masks: list[list[bool]]
) -> list[tuple[list[int], list[bool]]]:
    samples = []
    for ids, mask in zip(documents, masks, strict=True):
        samples += list(packer.add(np.array(ids, dtype=np.uint8), np.array(mask)))
    samples += list(packer.close())
    return [(ids.tolist(), counts.tolist()) for ids, counts in samples]


@pytest.mark.parametrize(
    "size, longest, window", [(16, 20, 200), (7, 30, 50), (1, 4, 9), (50, 9, 1)]
)
def test_samples_are_those_of_plain_best_fit(size: int, longest: int, window: int) -> None:
    random = np.random.default_rng(size)
    for count in (0, 1, 2, 40, 90):
        documents, masks = drawn(random, count, longest)
        packer = Packer(size, SEPARATOR, window)
        samples = packed(packer, documents, masks)
        assert samples == slow_pack(documents, masks, size, window)
        assert packer.samples == len(samples)
        # those of 1, 2, ... whole samples of text leave out their separator
        left_out = [len(ids) > 1 and (len(ids) - 1) % size == 0 for ids in documents]
        lengths = [len(ids) - out for ids, out in zip(documents, left_out, strict=True)]
        assert packer.cut == sum(length > size for length in lengths)
        assert packer.padding == len(samples) * size - sum(lengths)


def test_documents_that_fit_stay_whole() -> None:
    random = np.random.default_rng(3)
    documents = [[n] * random.integers(1, 60) + [SEPARATOR] for n in range(1, 200)]
    samples = packed(Packer(64, SEPARATOR, 1000), documents, [[True] * len(d) for d in documents])
    rows = [bytes(ids) for ids, _ in samples]
    for document in documents:
        assert [row.count(bytes(document)) for row in rows if document[0] in row] == [1]


def test_the_first_token_of_a_sample_and_what_fills_it_up_do_not_count() -> None:
    packer = Packer(8, SEPARATOR, 7)
    assert not list(packer.add(np.array([5, 6, 0])))
    ((ids, counts),) = packer.add(np.array([7, 8, 9, 0]), np.array([True, False, True, True]))
    assert ids.tolist() == [5, 6, 0, 7, 8, 9, 0, 0]
    assert counts.tolist() == [False, True, True, True, False, True, True, False]


def test_the_rest_of_a_document_begins_nothing_that_counts() -> None:
    """Its first token would be predicted from another document; so would a lone separator."""
    packer = Packer(8, SEPARATOR, 100)
    for document in ([5, 0], [*range(11, 22), 0], [*range(31, 39), 0]):
        assert not list(packer.add(np.array(document)))
    samples = [(ids.tolist(), counts.astype(int).tolist()) for ids, counts in packer.close()]
    assert samples == [
        ([5, 0, 19, 20, 21, 0, 0, 0], [0, 1, 0, 1, 1, 1, 0, 0]),
        ([*range(11, 19)], [0, 1, 1, 1, 1, 1, 1, 1]),
        ([*range(31, 39)], [0, 1, 1, 1, 1, 1, 1, 1]),
    ]
    assert (packer.cut, packer.padding) == (1, 2)


def test_room_is_used_well() -> None:
    """Lengths as of web text: hardly any padding, where cutting into blocks cuts nearly all."""
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(5, 1, 20_000).astype(int) + 2, 2048).tolist()
    bins = best_fit(lengths, 2048)
    assert sum(lengths) / (len(bins) * 2048) > 0.995
    assert sorted(number for inside in bins for number in inside) == list(range(20_000))


def test_the_window_bounds_what_is_held() -> None:
    assert window_of(2048) == 1024 * 2048
    assert window_of(1 << 20) == MOST_WINDOW_TOKENS
    assert window_of(1 << 26) == 1 << 26
    packer = Packer(10, SEPARATOR, 100)
    given = 0
    for number in range(500):
        given += 10 * len(list(packer.add(np.ones(7, dtype=np.uint8))))
        assert (number + 1) * 7 - given * 7 // 10 < 100 + 7
    with pytest.raises(ValueError, match="window of 0"):
        Packer(8, SEPARATOR, 0)


def test_a_build_packs_whole_documents_and_carries_their_masks(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    records = []
    for number in range(120):
        text = f"{number:03d} " + "".join(random.choice(list("abcdef"), random.integers(1, 50)))
        half = len(text) // 2
        records.append({"text": text, "mask": [[0, half]]} if number % 3 else {"text": text})
    records.append({"text": "long " + "x" * 200})
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, part in zip(files, (records[:70], records[70:]), strict=True):
        file.write_text("".join(json.dumps(record) + "\n" for record in part))
    sources = [str(file) for file in files]
    options: dict[str, Any] = {"pack": 64, "unit_bytes": 2000}
    index = small(sources, tmp_path / "out", **options)

    found: list[tuple[str, list[bool]]] = []
    for split in ("train", "validation"):
        shards = TokenShards(tmp_path / "out", split)
        samples = Samples(shards, 64)
        assert len(samples) == index["splits"][split]["tokens"] // 64
        padding = counted = 0
        for i in range(len(samples)):
            ids, mask = samples[i], samples.mask(i)
            assert mask is not None and ids.shape == mask.shape == (65,)
            assert not mask[0] and not mask[64], "the next sample's first token is no target"
            counted += int(mask.sum())
            body = bytes(ids[:64].astype(np.uint8))
            end = len(body.rstrip(b"\xff")) + body.endswith(b"\xff")
            padding += 64 - end
            assert not mask[end:].any()
            start = 0
            while start < end:
                after = body.find(b"\xff", start) + 1 or 64
                found.append((body[start:after].decode("latin1"), mask[start:after].tolist()))
                start = after
        assert index["packed"]["padding"][split] == padding
        assert index["splits"][split]["counted_tokens"] == counted
    expected = []
    for record in records:
        text, spans = record["text"] + "\xff", record.get("mask", [[0, 999]])
        mask = [any(a <= i < b for a, b in spans) for i in range(len(text))]
        if "mask" in record:
            mask[-1] = mask[-2]  # the separator counts as the last character does
        expected += [(text[i : i + 64], mask[i : i + 64]) for i in range(0, len(text), 64)]
    assert sorted(text for text, _ in found) == sorted(text for text, _ in expected)
    masks = dict(expected)
    for text, mask in found:
        assert mask[1:] == masks[text][1:] and mask[0] <= masks[text][0]
    assert sum(index["packed"]["cut"].values()) == 1
    assert index["packed"]["length"] == 64 and index["format"] == 2


def test_a_build_that_is_not_packed_says_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n} {n}"}}\n' for n in range(400)))
    index = small([str(tmp_path / "a.jsonl")], tmp_path / "out")
    assert "packed" not in index and index["format"] == 1
    with pytest.raises(UserError, match="other sources or options"):
        small([str(tmp_path / "a.jsonl")], tmp_path / "out", pack=32)
    with pytest.raises(UserError, match="pack is 1; it must be from 2"):
        small([str(tmp_path / "a.jsonl")], tmp_path / "other", pack=1)
