"""The whole configuration vocabulary: every key a recipe may hold, with its unit and default.

A recipe is a YAML file of these keys; ``nlscale train recipe.yaml key=value ...`` overrides them.
How a recipe is read, merged, explained and checked is in `nlscale.config.recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from nlscale.config.attention import AttentionConfig as AttentionConfig
from nlscale.config.choices import ClipScope as ClipScope
from nlscale.config.choices import CmsForm as CmsForm
from nlscale.config.choices import ContextObjective as ContextObjective
from nlscale.config.choices import ContextReset as ContextReset
from nlscale.config.choices import Decay as Decay
from nlscale.config.choices import Dtype as Dtype
from nlscale.config.choices import GateActivation as GateActivation
from nlscale.config.choices import MemoryGain as MemoryGain
from nlscale.config.choices import MemoryGates as MemoryGates
from nlscale.config.choices import MemoryWrite as MemoryWrite
from nlscale.config.choices import Part as Part
from nlscale.config.choices import Pending as Pending
from nlscale.config.choices import PeriodRule as PeriodRule
from nlscale.config.choices import Phases as Phases
from nlscale.config.choices import Purpose as Purpose
from nlscale.config.choices import Recompute as Recompute
from nlscale.config.choices import Reduction as Reduction
from nlscale.config.choices import Schedule as Schedule
from nlscale.config.choices import Sharding as Sharding
from nlscale.config.choices import Tier as Tier
from nlscale.config.choices import Updater as Updater
from nlscale.config.choices import WireFormat as WireFormat
from nlscale.config.context import ContextConfig as ContextConfig
from nlscale.config.fields import MOST as MOST
from nlscale.config.fields import one_of, or_list, path, within
from nlscale.config.hooks import HookConfig as HookConfig
from nlscale.config.levels import LevelConfig as LevelConfig
from nlscale.config.levels import LevelsConfig as LevelsConfig
from nlscale.config.levels import TiersConfig as TiersConfig
from nlscale.config.mixer_memory import MemoryConfig as MemoryConfig
from nlscale.config.optimizer import RULES as RULES
from nlscale.config.optimizer import OptimizerConfig as OptimizerConfig
from nlscale.config.outer import OuterConfig as OuterConfig
from nlscale.config.period_warmup import PeriodWarmupConfig as PeriodWarmupConfig

MIXERS = ["hope", "hope-pure", "hope-paper", "gated-delta", "deltanet", "retnet"]
MIXERS += ["linear-attention", "attention", "sliding-window"]
"""Names of the sequence mixers; what each is stands in `nlscale.model.mixers.table`."""

_YEAR = 365 * 86400


@dataclass
class RunConfig:
    """Where a run writes and what makes it reproducible."""

    dir: str = path("runs/default")
    """Folder of the run: resolved config, metrics.jsonl, summary.json, loss.png."""
    max_restarts: int = within(3, least=0)
    """Restarts of a Slurm job without a new checkpoint after which it gives up (exit code 4)."""
    seed: int = within(1234, least=0)
    """Seed of initial weights and of the order of the data."""
    purpose: Purpose = Purpose.result
    """result, or search: one of several runs that choose a setting, whose best is best by luck as
    well; `nlscale compare` takes it for no evidence. Sweeps with a `search` set it."""
    weights: str | None = path(None)
    """Folder of exported weights to start from instead of drawing them (continued pretraining);
    see `nlscale checkpoint export`."""
    imports: list[str] = field(default_factory=list)
    """Python modules to import first, which add mixers, optimizer rules or evaluations of their
    own; the command line adds to them. A run's own config.yaml names them in a comment alone."""


@dataclass
class CacheConfig:
    """Shards on another service, `data.dir` a URL: where this machine keeps them, and how they are
    fetched. The ranks of a machine share what is there."""

    dir: str | None = path(None)
    """Folder on a disk of this machine; null: nlscale/shards in $XDG_CACHE_HOME, or in ~/.cache."""
    size: str = "200 GB"
    """What it may take at most; the shards that were used least recently give way."""
    threads: int = within(8, above=0, most=256)
    """Shards that a rank fetches at once, before they are needed."""
    timeout: float = within(60.0, above=0, most=_YEAR)
    """Seconds without a byte after which an attempt is given up."""
    retries: int = within(4, least=0, most=100)
    """Attempts after the first, each after a longer pause: 1, 2, 4 ... 30 seconds."""


@dataclass
class SourceConfig:
    """One of the sources of a mixture: a data folder, and how much of the run reads it."""

    dir: str = path(url=True)
    """Folder of its shards and their index.json; or a URL of one."""
    weight: float | None = within(None, above=0)
    """Its share of the samples, over the sum of all weights; null, of all sources alike: its tokens
    to the power of data.temperature."""
    epochs: int | None = within(None, above=0)
    """Times that it is read at most, at each sequence length of the run; then the others share its
    place. Null: as often as its weight makes it."""
    name: str | None = None
    """In metrics and figures, of one source alone; null: the last part of dir."""


@dataclass
class DataStage:
    """Other data from some step on, until the next stage or the end; see nlscale.config.curriculum.

    The run begins with what the section `data` itself says.
    """

    from_: str = MISSING
    """When it begins: a share of train.steps such as '80%', or '1000 steps' that come before it."""
    sequence_length: int | None = within(None, above=0, most=MOST)
    """Tokens a sample trains on from then on; null: as before."""
    mixture: list[SourceConfig] = field(default_factory=list)
    """Folders that are mixed from then on, in place of those before; none: as before."""


@dataclass
class DataConfig:
    """The token shards made by ``nlscale data build``: of one folder, or of several, mixed."""

    dir: str | None = path(None, url=True)
    """Folder of the shards and their index.json; or a URL of one, s3://bucket/data or of another
    service that fsspec reads. Needed, unless there is a mixture."""
    mixture: list[SourceConfig] = field(default_factory=list)
    """Folders that are read in turn, each as often as its weight says, in place of data.dir."""
    temperature: float = within(1.0, least=0, most=10)
    """Power of a source's tokens that is its weight, where the mixture gives none: 1 reads all
    sources equally often, 0 as much of each."""
    sequence_length: int = within(1024, above=0, most=MOST)
    """Tokens a sample trains on (it reads one more, the last target)."""
    stages: list[DataStage] = field(default_factory=list)
    """What changes in the course of the run, such as a context extension at its end:
    [{from: 80%, sequence_length: 4096}], or an annealing mixture."""
    document_mask: bool = False
    """Begin memories, convolutions and attention anew with each document of a sample, as if it
    stood alone. False: a document sees those before it in the sample."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Shards that are fetched from another service."""

    def folders(self) -> list[str]:
        """The data folders: `dir` or those of the mixture, then those that stages add."""
        begins = [self.dir] if self.dir is not None else [source.dir for source in self.mixture]
        later = [source.dir for stage in self.stages for source in stage.mixture]
        return list(dict.fromkeys([*begins, *later]))


@dataclass
class BlockMixerConfig:
    """An entry of `model.pattern`: the mixer of some blocks."""

    mixer: str = one_of(MIXERS)
    """As `model.mixer`."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Its memory; what is left out is as `model.memory` says, and then as the mixer does."""


@dataclass
class ModelConfig:
    """The network. A Transformer is `mixer: attention` with one level."""

    mixer: str = one_of(MIXERS)
    """hope | hope-pure | hope-paper | gated-delta | deltanet | retnet | linear-attention |
    attention | sliding-window."""
    pattern: list[BlockMixerConfig] = field(default_factory=list)
    """Mixers of the blocks in turn, such as [hope, hope, {mixer: retnet, memory: {chunk: 32}}]:
    block i takes entry i mod their number, `mixer` says nothing. None: every block has `mixer`."""
    layers: int = within(12, above=0, most=MOST)
    """Blocks; each is a mixer followed by a CMS block."""
    d_model: int = within(768, above=0, most=MOST)
    """Width of the residual stream."""
    heads: int = within(12, above=0, most=MOST)
    """Heads of the mixer; the head dimension is d_model / heads, but for `attention.head_dim`."""
    cms: CmsForm = CmsForm.sequential
    """How the MLPs of a block's levels are composed: sequential (Eq. 70), independent, or nested
    (Eq. 72-73, first order): one MLP, of which slower levels hold copies."""
    hidden: int | None = within(None, above=0, most=MOST)
    """Hidden units of all CMS MLPs of a block together. Null: what makes mixer and CMS together
    as large as a Transformer block, 12 d_model^2, so that mixers compare at equal parameters."""
    vocabulary: int | None = within(None, above=0, most=MOST)
    """Token ids the model knows; null: what the data's tokenizer has."""
    tie_embeddings: bool = False
    """The head is the embedding: one matrix makes tokens vectors, and vectors logits. Needs
    parallel.pipeline 1."""
    rope_base: float = within(10000.0, above=0)
    """Base of the rotary positions of `attention` and `sliding-window`."""
    norm_eps: float = within(1e-6, above=0)
    """Added to the mean square in every RMSNorm."""
    init_std: float = within(0.02, above=0)
    """Standard deviation of initial weights; projections into the residual stream are divided
    by sqrt(2 layers)."""
    mup_base_width: int | None = within(None, above=0, most=MOST)
    """The d_model at which the optimizer's numbers and init_std were tuned: muP carries them over
    to this d_model, at the same head size and with the CMS wider in proportion
    (nlscale/model/width.py). Null, or d_model itself: the standard parametrisation."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The self-modifying memory."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Softmax attention."""


def mixers_of(model: ModelConfig) -> list[str]:
    """Name of the mixer of each block."""
    names = _names(model)
    return [names[i % len(names)] for i in range(model.layers)]


def mixer_label(model: ModelConfig) -> str:
    """What to call the mixers of a model: by name, of a pattern those of its entries."""
    names = _names(model)
    return names[0] if len(set(names)) == 1 else "+".join(names)


def _names(model: ModelConfig) -> list[str]:
    return [entry.mixer for entry in model.pattern] or [model.mixer]


def head_dim(model: ModelConfig) -> int:
    """Dimension of a head of the mixer."""
    return model.attention.head_dim or model.d_model // model.heads


def kv_heads(model: ModelConfig) -> int:
    """Heads of the keys and values of `attention`."""
    return model.attention.kv_heads or model.heads


@dataclass
class BatchStage:
    """A global batch from some step on, until the next stage or the end of the run."""

    from_: str = MISSING
    """When it begins: a share of train.steps such as '25%', or '1000 steps' that come before it;
    the first stage at 0."""
    size: int = within(above=0, most=MOST)
    """Sequences a step, over all ranks."""


if TYPE_CHECKING:
    GlobalBatch = int | list[BatchStage]
else:
    GlobalBatch = Any
"""`nlscale.config.curriculum` knows both forms, and is asked for the sizes of a run's steps."""


@dataclass
class TrainConfig:
    """The length and shape of training."""

    steps: int = within(1000, above=0)
    """Optimizer steps of the run."""
    global_batch: GlobalBatch = or_list(32, BatchStage, above=0, most=MOST)
    """Sequences a step, over all ranks; or a list of stages, [{from: 0%, size: 32}, {from: 25%,
    size: 64}]."""
    micro_batch: int = within(4, above=0, most=MOST)
    """Sequences a rank passes through the model at once."""
    dtype: Dtype = Dtype.bf16
    """bf16 or fp32 parameters and activations."""
    recompute: list[Recompute] = field(default_factory=list)
    """Parts of each block that are computed again in the backward pass instead of kept: `mixer`,
    `cms`. Same numbers, less memory, more time."""
    kernels: bool = True
    """On GPUs run the memory scan, the loss and the small operations as fused kernels, and add up
    the gradients of weights inside the products that make them; on a CPU, small operations with
    derivatives by hand. False: as torch operations, one by one, which on a GPU is many times
    slower; to find out whether a kernel is at fault."""
    z_loss: float = within(0.0, least=0)
    """Weight of the squared log-sum-exp of a token's logits in what is differentiated, which keeps
    it near 0 (PaLM: 1e-4). Losses that are reported are the cross entropy alone."""
    validate_every: int = within(100, above=0)
    """Steps between validations; one is always made before the first and after the last step."""
    validation_sequences: int = within(64, above=0, most=MOST)
    """Held-out sequences a validation reads, the first ones, the same each time; and each of what
    `evaluate` names."""
    drop_spikes: float | None = within(None, above=1)
    """Drop a step whose loss is more than this many times the median of the last 50 steps; null:
    only steps whose loss or gradient is not finite are dropped."""
    max_dropped_steps: int = within(8, above=0)
    """Dropped steps in a row after which training gives up."""


@dataclass
class ParallelConfig:
    """How the model and the batch are spread over ranks."""

    tensor: int = within(1, above=0, most=MOST)
    """Ranks that share every layer (tensor parallel)."""
    pipeline: int = within(1, above=0, most=MOST)
    """Ranks that share the stack of layers (pipeline parallel)."""
    sequence: bool = False
    """Split the residual stream along the sequence between the tensor-parallel regions (sequence
    parallel): activations shrink, the bytes sent stay the same. Needs tensor > 1."""
    virtual_stages: int = within(1, above=0, most=MOST)
    """Model stages a pipeline rank holds; above 1 the schedule is interleaved."""
    stages: list[int] | None = within(None, above=0, most=MOST)
    """Blocks of each of the pipeline x virtual_stages model stages, first stage first; null: cut
    so that the costliest stage costs least."""
    ranks_per_node: int | None = within(None, above=0, most=MOST)
    """Ranks on one node; null: what torchrun says (LOCAL_WORLD_SIZE), else all of them."""
    overlap: bool = True
    """Reduce gradients inside the node and across nodes while the backward pass goes on, bucket by
    bucket. False: when it is over; to find out what overlapping brings."""
    bucket_size: int = within(40_000_000, above=0, most=MOST)
    """Gradients that are reduced in one piece where reductions overlap, fp32: a sync group of more
    is cut into buckets. Smaller ones begin earlier, larger ones use a fast link better."""
    shard_optimizer: Sharding = Sharding.node
    """Ranks over which what updates a parameter is spread: the data-parallel ranks of a node, or of
    all nodes. With all, the memory for it falls with the nodes, and each node gets only its part of
    the summed gradients and sends out updated parameters, which in bf16 is less than the sums; what
    it sends after an update no backward pass hides. matrices: as all, but each matrix of a rule
    that takes whole ones (muon, m3, delta, deep) lies on one node, so that none is joined over the
    network: fewer bytes, spread less evenly. The updates are the same."""
    replica_check_every: int = within(200, least=0)
    """Steps between comparisons of parameters and optimizer state across replicas; 0: never."""
    straggler_check_every: int = within(50, least=0)
    """Steps between comparisons of how long the ranks compute; 0: never."""


@dataclass
class TimeoutsConfig:
    """Seconds after which a rank that is lost or hangs ends the run on all ranks, with exit code 5
    and one message that names it."""

    startup: float = within(1800.0, above=0, most=_YEAR)
    """Until all ranks have come together, and again for each part of the first step of a start, and
    for the next byte of a shard that is hashed before it."""
    step: float = within(600.0, above=0, most=_YEAR)
    """For each part of a later step, such as its consensus, and for a validation."""
    checkpoint: float = within(1800.0, above=0, most=_YEAR)
    """For writing a checkpoint and reading it back, for verifying one, and for going on from it."""
    silence: float = within(60.0, above=0, most=_YEAR)
    """A rank of which nothing is heard for so long was killed, stopped or cut off."""


@dataclass
class CheckpointConfig:
    """Checkpoints in run.dir/checkpoints; a run that is started again goes on from the newest."""

    every: str | None = "500 steps"
    """How often: '500 steps', '2B tokens' or '30 minutes'; null: only at `steps`."""
    steps: list[int] = within([], above=0)
    """Steps after which to save beside that, such as where a learning rate begins to fall. A run
    that saves at all saves after its last step too."""
    keep: int = within(2, above=0)
    """The newest checkpoints that are kept."""
    keep_every: int | None = within(None, above=0)
    """Beside them, those of every so many steps are kept for good; null: none."""
    mirror: str | None = None
    """URL of a folder of this run's own in object storage, such as s3://bucket/runs/a, to which
    finished checkpoints are copied beside the training, and from which a run goes on whose folder
    holds none; null: nowhere. The client of the service finds the credentials."""
    pending: Pending = Pending.canonical
    """How unfinished windows are stored: canonical (any layout) or exact (same layout only)."""


@dataclass
class ResumeConfig:
    """Going on from a checkpoint."""

    allow: list[str] = field(default_factory=list)
    """Keys whose value may differ from the checkpoint's, `data` for other data, `data.tokenizer`
    for data of another tokenizer. Without it a change that would make it another run is refused."""
    start: str | None = path(None)
    """Checkpoint of another run to branch from, such as runs/a/checkpoints/step-00000800, used only
    while this run has none of its own. That run may differ in length, where its learning rate does
    not depend on that up to there (wsd before its decay)."""


@dataclass
class WandbConfig:
    """Weights & Biases; metrics.jsonl is written in any case."""

    enabled: bool = False
    """Track the run with wandb; without a key or network it is tracked offline."""
    project: str = "nlscale"
    """Project name."""
    name: str | None = None
    """Run name; null: the last part of run.dir."""


@dataclass
class Config:
    """A run."""

    evaluate: list[str] = field(default_factory=list)
    """Evaluations made with each validation (`train.validate_every`), beside its loss, into
    metrics.jsonl and loss.png: `positions`, the loss by position in the context; `task`, the
    accuracy on a task; what `run.imports` add. Each of these two takes as long as a validation."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    hooks: list[HookConfig] = field(default_factory=list)
    """What is called each time that a level updates, or after some steps, such as [{name: replay,
    level: slow}]; `run.imports` add more."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
