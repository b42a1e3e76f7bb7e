"""Degrees of parallelism and their checks: plain numbers, before anything heavy is imported."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.description import ModelDescription


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism; data parallelism is what remains of the world."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool = False
    stages: tuple[int, ...] = ()  # layers of each pipeline stage in the order of the model; empty for equal stages

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one copy of the model and its tokens."""
        return self.tp * self.cp * self.pp

    def product(self, world_size: int) -> str:
        """The whole product in words, for messages."""
        dp = world_size / self.ranks_per_replica
        experts = f", experts ep {self.ep} x etp {self.etp}" if self.ep * self.etp > 1 else ""
        return f"tp {self.tp} x cp {self.cp} x pp {self.pp} x dp {dp:g} = {world_size} ranks{experts}"


def _divisors(number: int, limit: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, limit) + 1) if number % n == 0)


def _require(number: int, by: int, what: str, flag: str, product: str) -> None:
    """Refuses a degree that does not divide `number`, naming those that do and the whole product."""
    if number % by:
        nearest = max(n for n in range(1, by + 1) if number % n == 0)
        raise ValueError(
            f"{flag} {by} does not divide {what} ({number}) in {product}; the nearest smaller choice is {nearest} "
            f"(all: {_divisors(number, 64)})"
        )


def check_ranks(layout: Layout, world_size: int) -> None:
    """Refuses degrees that make no grid of so many ranks, whatever the model; ValueError in one sentence."""
    for name in ("tp", "cp", "pp", "vpp", "ep", "etp"):
        if getattr(layout, name) < 1:
            raise ValueError(f"--{name} {getattr(layout, name)} must be at least 1")
    if layout.vpp > 1 and layout.pp == 1:
        raise ValueError(f"--vpp {layout.vpp} interleaves pipeline stages and needs --pp of at least 2")
    if layout.sp and layout.tp == 1:
        raise ValueError("--sp on splits the sequence over tensor-parallel ranks and needs --tp of at least 2")
    replica = layout.ranks_per_replica
    if world_size % replica:
        below, above = world_size // replica * replica, (world_size // replica + 1) * replica
        choices = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"{world_size} ranks cannot be split as tp {layout.tp} x cp {layout.cp} x pp {layout.pp} = {replica} "
            f"ranks per model replica; start {choices} ranks (torchrun --nproc-per-node) or lower a degree"
        )
    expert = layout.ep * layout.etp * layout.pp
    if world_size % expert:
        raise ValueError(
            f"{world_size} ranks cannot be split as ep {layout.ep} x etp {layout.etp} x pp {layout.pp} = {expert} "
            f"ranks for the experts; choose --ep times --etp among {_divisors(world_size // layout.pp, 64)}"
        )


def check_layout(layout: Layout, world_size: int, description: ModelDescription) -> None:
    """Refuses a layout that ranks or model do not allow; ValueError in one sentence, before any group exists."""
    check_ranks(layout, world_size)
    fields, product = description.transformer, layout.product(world_size)
    layers = fields["num_layers"]
    _require(fields["num_attention_heads"], layout.tp, "the attention heads", "--tp", product)
    _require(fields["num_query_groups"], layout.tp, "the key-value heads", "--tp", product)
    if "num_moe_experts" not in fields:
        _require(fields["ffn_hidden_size"], layout.tp, "the feed-forward size", "--tp", product)
    _require(description.padded_vocab_size, layout.tp, "the padded vocabulary", "--tp", product)
    if layout.stages:
        _check_stages(layout, layers)
    else:
        _require(layers, layout.pp, "the layers", "--pp", product)
        share = layers // layout.pp
        _require(share, layout.vpp, f"the layers of a pipeline stage at --pp {layout.pp}", "--vpp", product)
    _check_experts(layout, fields, product)


def _check_stages(layout: Layout, layers: int) -> None:
    given = ",".join(map(str, layout.stages))
    if len(layout.stages) != layout.pp * layout.vpp:
        raise ValueError(
            f"--pp-layout {given} has {len(layout.stages)} stages and --pp {layout.pp} x --vpp {layout.vpp} make "
            f"{layout.pp * layout.vpp}"
        )
    if sum(layout.stages) != layers or min(layout.stages) < 1:
        raise ValueError(
            f"--pp-layout {given} adds up to {sum(layout.stages)} layers and the model has {layers}, of which each "
            "stage takes at least one"
        )


def _check_experts(layout: Layout, fields: dict[str, Any], product: str) -> None:
    experts = fields.get("num_moe_experts")
    if experts is None:
        if layout.ep * layout.etp > 1:
            raise ValueError(f"--ep {layout.ep} --etp {layout.etp}: this model has no experts; leave both at 1")
        return
    _require(experts, layout.ep, "the experts", "--ep", product)
    _require(fields["moe_ffn_hidden_size"], layout.etp, "the experts' feed-forward size", "--etp", product)
    if layout.tp > 1 and not layout.sp:
        raise ValueError(f"--tp {layout.tp} with experts needs sequence parallelism: leave --sp at auto")


def check_sequence(layout: Layout, seq_len: int, pad_documents_to: int) -> None:
    """Refuses a sequence length that the layout cannot split; ValueError in one sentence."""
    if pad_documents_to % (2 * layout.cp) and layout.cp > 1:
        raise ValueError(
            f"--pad-documents-to {pad_documents_to} is no multiple of 2*cp = {2 * layout.cp}, into which context "
            f"parallelism cuts each document; start with --pad-documents-to {2 * layout.cp} or leave it out"
        )
    step = math.lcm(pad_documents_to, layout.cp * (layout.tp if layout.sp else 1))
    if seq_len % step:
        below = seq_len // step * step
        raise ValueError(
            f"--seq-len {seq_len} does not divide into documents padded to {pad_documents_to} tokens over cp "
            f"{layout.cp} and {'sequence-parallel ' if layout.sp else ''}tp {layout.tp}; the nearest choices are "
            f"{below or step} and {below + step}"
        )


def check_expert_widths(layout: Layout, description: ModelDescription, itemsize: int) -> None:
    """Refuses experts whose rows torch's grouped product cannot take, in numbers of `itemsize` bytes; ValueError."""
    fields, unit = description.transformer, 16 // itemsize
    if "num_moe_experts" not in fields:
        return
    hidden, ffn = fields["hidden_size"], fields["moe_ffn_hidden_size"]
    if hidden % unit or ffn // layout.etp % unit:
        raise ValueError(
            f"--etp {layout.etp} gives each rank experts of hidden size {hidden} and feed-forward size "
            f"{ffn // layout.etp} (of {ffn}), and at {itemsize} bytes a number their grouped product takes multiples "
            f"of {unit} alone; {_widths_that_fit(hidden, ffn, layout.etp, unit)}"
        )


def _widths_that_fit(hidden: int, ffn: int, etp: int, unit: int) -> str:
    fitting = [str(n) for n in range(1, etp) if ffn % n == 0 and ffn // n % unit == 0]
    if hidden % unit or not fitting:
        return "this model does not train at this --precision"
    return f"choose --etp among {', '.join(fitting)}"


def world_from_environment() -> tuple[int, int, int]:
    """Returns (rank, world size, local rank) as torchrun and SLURM set them; a lone process is (0, 1, 0)."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "MASTER_ADDR" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0
