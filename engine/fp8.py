"""What FP8 recipes ask of a GPU and of sizes, before a run starts; pure."""

from __future__ import annotations

from dataclasses import dataclass

from engine.layout import Layout
from models.description import ModelDescription

NO_LIMIT = (99, 0)
Machine = tuple[tuple[int, int], tuple[int, int]]  # compute capability, CUDA's version


@dataclass(frozen=True)
class Fp8Recipe:
    """Conditions of Transformer Engine 2.12: `quantization.py` (devices), `utils.py` and the tensors' own (sizes)."""

    unit: int  # divides both sides of every product
    least: tuple[int, int]  # compute capability
    below: tuple[int, int] = NO_LIMIT
    cuda: tuple[int, int] = (12, 0)

    def lacks(self, capability: tuple[int, int], cuda: tuple[int, int]) -> str | None:
        """What a machine lacks, or None."""
        if not self.least <= capability < self.below:
            upper = f", below {_dotted(self.below)}" if self.below < NO_LIMIT else ""
            asked = f"{_dotted(self.least)} or higher{upper}"
            return f"needs compute capability {asked}, and this GPU has {_dotted(capability)}"
        if cuda < self.cuda:
            return f"needs CUDA {_dotted(self.cuda)}, and torch was built for {_dotted(cuda)}"
        return None


RECIPES = {
    "tensorwise": Fp8Recipe(16, (8, 9)),
    "blockwise": Fp8Recipe(128, (9, 0), cuda=(12, 9)),
    "delayed": Fp8Recipe(16, (8, 9)),
    "mxfp8": Fp8Recipe(32, (10, 0), below=(12, 0)),
}


def check_fp8(
    name: str, layout: Layout, tokens: int, description: ModelDescription, machine: Machine | None = None
) -> None:
    """Refuses a recipe that sizes or a GPU do not allow; ValueError that names those that work there.

    tokens: a microbatch's. machine: (compute capability, CUDA's version), None where no GPU is to be asked.
    """
    sizes = _sizes(layout, tokens, description)
    lack = _lack(name, sizes, machine)
    if lack is None:
        return
    able = [f"--fp8 {other}" for other in RECIPES if _lack(other, sizes, machine) is None]
    offer = f"{' or '.join(able)} {'works' if machine else 'fits'} here" if able else "use --precision bf16"
    raise ValueError(f"--fp8 {name} {lack}; {offer}")


def _lack(name: str, sizes: dict[str, int], machine: Machine | None) -> str | None:
    """What keeps a recipe from being used, or None."""
    recipe = RECIPES[name]
    wrong = next((what for what, size in sizes.items() if size % recipe.unit), None)
    if wrong is not None:
        return f"takes products in units of {recipe.unit}, which does not divide {wrong}"
    return recipe.lacks(*machine) if machine else None


def _sizes(layout: Layout, tokens: int, description: ModelDescription) -> dict[str, int]:
    """Every side of a rank's products, by what it is."""
    fields = description.transformer
    local = tokens // layout.cp // (layout.tp if layout.sp else 1)
    queries = fields["num_attention_heads"] * fields["kv_channels"] // layout.tp
    keys = fields["num_query_groups"] * fields["kv_channels"] // layout.tp
    experts = "num_moe_experts" in fields
    ffn = fields["moe_ffn_hidden_size"] // layout.etp if experts else fields["ffn_hidden_size"] // layout.tp
    return {
        f"the {local} tokens of a rank's microbatch": local,
        f"the hidden size {fields['hidden_size']}": fields["hidden_size"],
        f"the {queries} numbers of a rank's queries": queries,
        f"the {queries + 2 * keys} numbers of a rank's queries, keys and values": queries + 2 * keys,
        f"the {'experts' if experts else 'feed-forward'} size of a rank {ffn}": ffn,
    }


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
