"""Checksums of tensors, piece by piece."""

from __future__ import annotations

import pytest
import torch

from nlscale.parallel import replicas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 63, 64, 1000])
def test_pieces_give_the_checksum_of_the_whole(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    whole = replicas.checksum(x)
    monkeypatch.setattr(replicas, "_WORDS_AT_ONCE", 64)
    assert replicas.checksum(x) == whole
    words = x.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).tolist()
    expected = sum(word * (2 * i + 1) for i, word in enumerate(words))
    assert (int(whole) - expected) % 2**64 == 0
    y = x.clone()
    y[size // 2] = -y[size // 2] - 1
    assert replicas.checksum(y) != whole
    if size > 1:
        assert replicas.checksum(x.flip(0)) != whole
