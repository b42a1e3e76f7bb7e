"""The whole run as frozen dataclasses: every setting, its default and a line that explains it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data.audit import MAX_DROPPED
from engine.layout import Layout


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 2e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Where cosine, linear and wsd end."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Learning rate after warmup."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    warmup_init: float = 0.0
    """Learning rate at which warmup starts."""
    decay_steps: int = 0
    """Length of the final decay of wsd."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    decay_one_dimensional: bool = False
    """Also decay norms and biases."""
    clip_grad: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 never clips."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """How AdamW keeps its two moments; bf16 (rounded stochastically, so without a bias) saves 4 bytes a parameter."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """How gradients are summed over microbatches and ranks; bf16 halves their buffers and what travels, and rounds."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 0
    """Save every N steps; the last step is always saved."""
    keep: int = 0
    """Keep the newest N checkpoints; 0 keeps all."""
    keep_every: int = 0
    """Beside them, keep every checkpoint whose step is a multiple of N."""
    keep_best: int = 0
    """Beside them, keep the N checkpoints with the lowest held-out loss."""
    rescue_every: int = 0
    """Between saves, write every N steps a checkpoint that the next one replaces; 0 writes none."""
    rescue_minutes: float = 0.0
    """The same, after so many minutes since the last save."""
    asynchronous: Annotated[Literal["on", "off"], tyro.conf.arg(name="async")] = "on"
    """Write checkpoints beside the training, from a copy in the host's memory."""
    resume: bool = True
    """Continue from RUN's latest checkpoint where there is one."""
    resume_from: int | None = None
    """Go back to the checkpoint of this step; what lies beyond it is set aside."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from those of the run that is resumed although they change its course."""
    export_hf: bool = False
    """Also write each checkpoint as a Hugging Face directory, RUN/hf/step_NNNNNN."""
    minutes_before_end: float | None = None
    """Save and stop so many minutes before a SLURM job's end; by default twice what saves take, and one; 0 never."""


@dataclass(frozen=True, kw_only=True)
class OverrideConfig:
    """Changes to the base model's config; they reach the export."""

    rope_theta: float | None = None
    max_position_embeddings: int | None = None
    resize_embeddings: bool = False
    """Add a row, the mean of the others, for each token that the data's tokenizer has and the model lacks."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts."""

    aux_loss: float = 0.0
    """Coefficient of each layer's load-balancing loss, taken document by document; 0 for none."""
    freeze_router: bool = False
    """Leave the routers as they are."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens reach their experts' ranks; flex is DeepEP, on GPUs that have it."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does when a step goes wrong or never ends."""

    max_skips: int = 10
    """Steps that --on-bad-step skip may skip in all; of more than 3 in a row none is skipped."""
    spike: float = 2.0
    """A loss above so many times the median of the last 50 is flagged as a spike; 0 flags none."""
    patience: float = 10.0
    """A step that takes so many times as long as the longest of the last 50 ends the run; 0 waits for ever."""
    minutes: float = 10.0
    """But no step ends the run in less; the first step, a save or start-up has six times as long."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl and TensorBoard."""

    wandb: bool = False
    """Also log to Weights & Biases (pip install lathe[track])."""
    wandb_project: str = "lathe"
    print_every: int = 10
    """Steps between progress lines when the output is no terminal."""
    peak_tflops: float = 0.0
    """One device's peak in TFLOP/s, for mfu; 0 leaves mfu unknown."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    model: str | None = None
    """Hugging Face directory or hub name, or one of our checkpoints; left out, the built-in demo's model."""
    data: tuple[str, ...] = ()
    """Prepared data directories, each with an optional :WEIGHT; left out, the built-in demo's data."""
    max_dropped: float = MAX_DROPPED
    """The largest share of a directory's rows that its preparation may have dropped; beyond it the run is refused."""
    allow_unsupervised: bool = False
    """Train although a source, a kind of row or a document that --too-long cuts off has no supervised token."""
    valid: tuple[str, ...] = ()
    """Prepared data for held-out losses, each DATA or NAME=DATA; each is measured by itself and all together."""
    valid_every: int = 0
    """Steps between held-out losses; 0 measures after the last step only."""
    valid_at_start: bool = False
    """Also measure the held-out losses before the first step."""
    valid_batches: int = 0
    """Batches of 64 packed sequences of each held-out set in a measurement; 0 takes all."""
    output: Path = Path("runs/default")
    """RUN: where config, metrics, checkpoints and the report go."""

    tp: int = 1
    """Tensor parallelism."""
    cp: int = 1
    """Context parallelism."""
    pp: int = 1
    """Pipeline parallelism."""
    vpp: int = 1
    """Interleaved stages a pipeline rank holds."""
    pp_layout: str | None = None
    """Layers of each of the pp*vpp stages, in the order of the model, if they are not equal, e.g. 7,9,9,7."""
    ep: int = 1
    """Expert parallelism."""
    etp: int = 1
    """Expert tensor parallelism."""
    sp: Literal["auto", "on", "off"] = "auto"
    """Sequence parallelism; auto is on with --tp above 1."""

    seq_len: int = 4096
    """Tokens of a packed sequence."""
    micro_batch_size: int = 1
    """Packed sequences of a microbatch."""
    global_batch_size: int = 128
    """Size of a step's batch, counted in --batch-unit."""
    batch_unit: Literal["sequences", "conversations"] = "conversations"
    """Whether a batch is counted in packed sequences or in conversations."""
    pad_documents_to: int | None = None
    """Each document is padded to a multiple of this; 2*cp unless given, and kept on resume."""
    too_long: Literal["error", "drop", "truncate", "cut"] = "error"
    """What to do with documents longer than --seq-len; cut makes several documents of one and loses no token."""
    steps: int | None = None
    """Length of the run in steps; with --epochs beside it, the first that is reached ends the run."""
    epochs: float | None = None
    """Length of the run in epochs; 1 where neither is given."""
    seed: int = 1234
    """Seed of the data's order."""

    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Arithmetic of weights and activations; master weights are fp32, and sums of gradients by --optim.gradients."""
    fp8: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """FP8 recipe of --precision fp8."""
    backend: Literal["auto", "te", "native"] = "auto"
    """Transformer Engine's layers or native torch's."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, those of --recompute-modules, or whole layers'."""
    recompute_modules: tuple[Literal["norm", "activation", "mlp", "experts"], ...] = ()
    """What selective recomputes; unless given, norm and activation, which cost next to nothing."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Reduce gradients and gather weights while others are computed; auto does on GPUs."""
    bucket_size: int = 0
    """Parameters of a gradient bucket, the unit of that overlap; 0 leaves it to megatron-core."""
    deterministic: bool = False
    """Repeat every sum in the same order, so that the same start gives the same bits; slower on GPUs."""

    on_bad_step: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is not finite: stop, or skip it and write its documents down."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    override: OverrideConfig = field(default_factory=OverrideConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    mcore: Annotated[dict[str, object], tyro.conf.Suppress] = field(default_factory=dict)
    """TransformerConfig fields by name, given as --mcore.FIELD=VALUE."""

    @property
    def layout(self) -> Layout:
        """The degrees of parallelism with sequence parallelism resolved."""
        sp = self.tp > 1 if self.sp == "auto" else self.sp == "on"
        stages = tuple(int(count) for count in self.pp_layout.split(",")) if self.pp_layout else ()
        degrees = {name: getattr(self, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")}
        return Layout(**degrees, sp=sp, stages=stages)

    @property
    def pad_multiple(self) -> int:
        """Documents are padded to a multiple of this many tokens."""
        return self.pad_documents_to or 2 * self.cp
