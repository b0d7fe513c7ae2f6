"""A plain Transformer and its training step in torch alone: what `bench train` is measured by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlscale.bench.clock import median_seconds
from nlscale.config.curriculum import at_stage, largest
from nlscale.config.vocabulary import Config, Dtype, head_dim
from nlscale.model.sizes import level_hidden


class Layer(nn.Module):
    """Attention with rotary positions and SwiGLU, pre-normalised, as `nlscale.model` has them."""

    def __init__(self, d_model: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(d_model, eps) for _ in range(2))
        self.project = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, d_model = x.shape
        projected = self.project(self.norms[0](x)).view(batch, length, 3, self.heads, -1)
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        q, k = (_rotate(z, cos, sin) for z in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, d_model))
        gate, up = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """tokens and targets [batch, sequence] -> mean loss."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        model, hidden = config.model, sum(level_hidden(config))
        self.embedding = nn.Embedding(vocabulary, model.d_model)
        self.layers = nn.ModuleList(
            Layer(model.d_model, model.heads, hidden, model.norm_eps) for _ in range(model.layers)
        )
        self.norm = nn.RMSNorm(model.d_model, model.norm_eps)
        self.head = nn.Linear(model.d_model, vocabulary, bias=False)
        half = head_dim(model) // 2
        frequency = model.rope_base ** (-torch.arange(half) / half)
        angle = torch.arange(config.data.sequence_length)[:, None] * frequency
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


def bench_transformer(
    config: Config, vocabulary: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Time steps of AdamW (fused, in the precision of the weights), compiled on a GPU.

    The batch and its micro batches are those of the recipe; dtype is that of all weights.
    """
    stage = largest(config)
    config = at_stage(config, stage)
    train, length, rows = config.train, stage.sequence_length, stage.global_batch
    dtype = torch.bfloat16 if train.dtype == Dtype.bf16 else torch.float32
    model = Transformer(config, vocabulary).to(device, dtype)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    loss_of = torch.compile(model) if on_gpu else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    micro_batches = rows // train.micro_batch

    def step(samples: Tensor) -> None:
        for part in samples.split(train.micro_batch):
            (loss_of(part[:, :-1], part[:, 1:]) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def samples() -> Tensor:
        return torch.randint(vocabulary, (rows, length + 1), device=device)

    median = median_seconds(device, steps, step, samples)
    return {
        "tokens_per_second": rows * length / median,
        "median_step_seconds": median,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }
