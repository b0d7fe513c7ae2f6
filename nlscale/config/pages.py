"""Where the documentation says more of each key of a recipe. No torch is imported.

tests/config/test_config_pages.py holds the table to the vocabulary and to the pages' headings.
"""

from __future__ import annotations

import re

PAGES = {
    "evaluate": "how-to/add-an-evaluation.md",
    "run": "how-to/launch.md",
    "run.seed": "concepts/layouts.md#initial-weights",
    "run.purpose": "how-to/compare.md#settings-that-were-chosen",
    "run.weights": "concepts/checkpoints.md#exports",
    "run.imports": "how-to/add-a-mixer.md",
    "data": "concepts/data.md",
    "data.dir": "concepts/data.md#shards-and-their-index",
    "data.cache": "concepts/data.md#shards-elsewhere",
    "data.mixture": "concepts/data.md#mixtures",
    "data.temperature": "concepts/data.md#mixtures",
    "data.sequence_length": "concepts/data.md#samples",
    "data.stages": "concepts/data.md#stages-of-a-run",
    "data.document_mask": "concepts/memory.md#documents",
    "model": "concepts/cms.md#the-whole-model",
    "model.mixer": "concepts/memory.md#modes",
    "model.cms": "concepts/cms.md#sequential-and-independent",
    "model.hidden": "concepts/cms.md#widths-and-the-budget",
    "model.vocabulary": "concepts/data.md#shards-and-their-index",
    "model.init_std": "concepts/scaling.md#from-a-narrow-model-to-a-wide-one",
    "model.mup_base_width": "concepts/scaling.md#from-a-narrow-model-to-a-wide-one",
    "model.tie_embeddings": "concepts/attention.md#one-matrix-for-embedding-and-head",
    "model.attention": "concepts/attention.md",
    "model.memory": "concepts/memory.md",
    "model.memory.chunk": "concepts/memory.md#the-chunk-form",
    "model.memory.convolution": "concepts/memory.md#what-feeds-the-memory",
    "model.memory.lambda_init": "concepts/memory.md#the-default-mixer",
    "model.memory.anchored": "concepts/memory.md#anchored-decay",
    "model.memory.c": "concepts/memory.md#the-delta-rule-and-c",
    "model.memory.normalize_value": "concepts/memory.md#what-makes-it-trainable",
    "model.memory.separate_inputs": "concepts/memory.md#what-feeds-the-memory",
    "model.memory.static_gates": "concepts/memory.md#what-feeds-the-memory",
    "model.memory.output_gate": "concepts/memory.md#what-feeds-the-memory",
    "model.memory.read_norm": "concepts/memory.md#what-feeds-the-memory",
    "model.memory.eta_bias": "concepts/memory.md#what-makes-it-trainable",
    "model.memory.alpha_bias": "concepts/memory.md#what-makes-it-trainable",
    "levels": "concepts/levels.md",
    "levels.spectrum": "concepts/levels.md#what-a-level-is",
    "levels.spectrum.N.period": "concepts/levels.md#periods-in-steps-or-tokens",
    "levels.spectrum.N.parts": "concepts/levels.md#what-belongs-to-a-level",
    "levels.spectrum.N.hidden": "concepts/cms.md#widths-and-the-budget",
    "levels.spectrum.N.wire": "concepts/windows.md#what-crosses",
    "levels.spectrum.N.outer": "concepts/outer.md#the-outer-step",
    "levels.spectrum.N.local": "concepts/outer.md#local-levels",
    "levels.spectrum.N.context": "concepts/context.md",
    "levels.spectrum.N.learning_rate": "concepts/levels.md#the-learning-rate-of-a-level",
    "levels.spectrum.N.optimizer": "how-to/choose-an-optimizer.md#a-rule-for-one-level",
    "levels.stagger": "concepts/levels.md#phases-and-staggering",
    "levels.learning_rate_rule": "concepts/levels.md#the-learning-rate-of-a-level",
    "levels.reduction": "concepts/levels.md#why-deferral-is-exact",
    "levels.period_warmup": "concepts/levels.md#periods-that-grow",
    "optimizer": "concepts/optimizers.md",
    "optimizer.rule": "how-to/choose-an-optimizer.md",
    "optimizer.learning_rate": "concepts/levels.md#the-learning-rate-of-a-level",
    "optimizer.min_learning_rate": "concepts/levels.md#the-learning-rate-of-a-level",
    "optimizer.schedule": "concepts/scaling.md#runs-that-share-their-stable-phase",
    "optimizer.decay_fraction": "concepts/scaling.md#runs-that-share-their-stable-phase",
    "optimizer.warmup_steps": "concepts/levels.md#the-learning-rate-of-a-level",
    "optimizer.warmup_updates": "concepts/levels.md#the-learning-rate-of-a-level",
    "optimizer.beta1": "concepts/optimizers.md#adamw",
    "optimizer.beta2": "concepts/optimizers.md#adamw",
    "optimizer.eps": "concepts/optimizers.md#adamw",
    "optimizer.betas_by_period": "concepts/optimizers.md#memories-at-the-period-of-a-level",
    "optimizer.weight_decay": "concepts/windows.md#what-an-update-is",
    "optimizer.matrices": "concepts/optimizers.md#which-parameters",
    "optimizer.matrices.learning_rate": "concepts/optimizers.md#sizes-and-width",
    "optimizer.matrices.scale": "concepts/optimizers.md#sizes-and-width",
    "optimizer.matrices.coefficients": "concepts/optimizers.md#newton-schulz",
    "optimizer.matrices.iterations": "concepts/optimizers.md#newton-schulz",
    "optimizer.muon": "concepts/optimizers.md#muon",
    "optimizer.m3": "concepts/optimizers.md#m3",
    "optimizer.delta": "concepts/optimizers.md#delta",
    "optimizer.deep": "concepts/optimizers.md#deep",
    "optimizer.sgd": "concepts/optimizers.md#sgd",
    "optimizer.clip": "concepts/windows.md#clipping",
    "optimizer.clip_scope": "concepts/windows.md#clipping",
    "train": "concepts/data.md#steps-tokens-and-epochs",
    "train.global_batch.N.from": "concepts/data.md#stages-of-a-run",
    "train.micro_batch": "concepts/layouts.md#data-parallel-ranks-and-micro-batches",
    "train.dtype": "concepts/memory.md#precision",
    "train.recompute": "concepts/layouts.md#recomputing",
    "train.kernels": "concepts/memory.md#kernels",
    "train.z_loss": "concepts/attention.md#z-loss",
    "train.validate_every": "concepts/data.md#held-out-documents",
    "train.validation_sequences": "concepts/data.md#held-out-documents",
    "train.drop_spikes": "concepts/windows.md#steps-that-are-dropped",
    "train.max_dropped_steps": "concepts/windows.md#steps-that-are-dropped",
    "parallel": "concepts/layouts.md",
    "parallel.tensor": "concepts/layouts.md#tensor-parallel",
    "parallel.sequence": "concepts/layouts.md#sequence-parallel",
    "parallel.pipeline": "concepts/layouts.md#pipeline-and-virtual-stages",
    "parallel.virtual_stages": "concepts/layouts.md#pipeline-and-virtual-stages",
    "parallel.stages": "concepts/layouts.md#pipeline-and-virtual-stages",
    "parallel.ranks_per_node": "concepts/layouts.md#nodes",
    "parallel.overlap": "concepts/windows.md#how-the-link-is-hidden",
    "parallel.bucket_size": "concepts/windows.md#how-the-link-is-hidden",
    "parallel.replica_check_every": "concepts/layouts.md#what-is-the-same-on-which-layout",
    "parallel.straggler_check_every": "how-to/launch.md",
    "timeouts": "how-to/launch.md",
    "checkpoint": "concepts/checkpoints.md",
    "checkpoint.keep": "concepts/checkpoints.md#the-store",
    "checkpoint.keep_every": "concepts/checkpoints.md#the-store",
    "checkpoint.mirror": "how-to/resume.md#a-copy-elsewhere",
    "checkpoint.pending": "concepts/checkpoints.md#pending-windows",
    "resume": "concepts/checkpoints.md#what-may-change",
    "resume.start": "concepts/scaling.md#runs-that-share-their-stable-phase",
    "wandb": "how-to/launch.md",
}
"""Page, and heading where one is meant, by the beginning of a key; the longest that fits counts.

Pages lie in docs/. `N` stands for the index into a list.
"""


def page_of(key: str) -> str:
    """Where to read about a key: a file of the repository, and the heading in it.

    Args:
        key: dotted, of a recipe; it may hold indices into lists.
    """
    parts = re.sub(r"\.\d+(?=\.|$)", ".N", key).split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return f"docs/{next(PAGES[prefix] for prefix in prefixes if prefix in PAGES)}"
