"""The parity matrix: every family under every layout against the plain Hugging Face model, in fp32.

    python -m tests.support.parity [--families llama ...] [--layouts dp1 ...] [--backend te]

trains each tiny model four steps under each layout and prints, as a Markdown table, the worst relative error of the
losses and, below it, the worst relative L2 error of any parameter's first gradient. The tests measure the same cells.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from engine.config import OptimConfig
from engine.layout import Layout
from tests.support.tiny import EXPERTS, MODELS, conversations, reference, save_model
from tests.support.training import relative, step_batches, train
from tests.support.world import Pool

STEPS = 4
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, clip_grad=1.0, schedule="constant")
INDEX = conversations(30, sources=3)
# By name: (ranks, layout). Data parallelism is what remains of the ranks.
LAYOUTS = {
    "dp1": (1, Layout()),
    "tp2": (2, Layout(tp=2, sp=True)),
    "tp2 without sp": (2, Layout(tp=2)),
    "cp2": (2, Layout(cp=2)),
    "cp4": (4, Layout(cp=4)),
    "pp2": (2, Layout(pp=2)),
    "pp2 uneven": (2, Layout(pp=2, stages=(1, 3))),
    "pp2 vpp2": (2, Layout(pp=2, vpp=2)),
    "pp4": (4, Layout(pp=4)),
    "dp2": (2, Layout()),
    "dp2 tp2": (4, Layout(tp=2, sp=True)),
    "tp2 cp2": (4, Layout(tp=2, cp=2, sp=True)),
    "tp2 pp2": (4, Layout(tp=2, pp=2, sp=True)),
    "cp2 pp2": (4, Layout(cp=2, pp=2)),
}
EXPERT_LAYOUTS = {
    "ep2": (2, Layout(ep=2)),
    "ep4": (4, Layout(ep=4)),
    "ep2 tp2": (2, Layout(ep=2, tp=2, sp=True)),
    "ep2 cp2": (2, Layout(ep=2, cp=2)),
    "ep2 pp2": (4, Layout(ep=2, pp=2)),
    "dp4 ep2": (4, Layout(ep=2)),
    "etp2": (2, Layout(etp=2)),
    "ep2 etp2 tp2": (4, Layout(ep=2, etp=2, tp=2, sp=True)),
}


def layouts_of(name: str) -> dict[str, tuple[int, Layout]]:
    """The layouts that a tiny model is tried under; experts need sequence parallelism with tensor parallelism."""
    if name not in EXPERTS:
        return LAYOUTS
    return {key: value for key, value in LAYOUTS.items() if key != "tp2 without sp"} | EXPERT_LAYOUTS


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The worst relative errors of a cell."""

    loss: float
    source: float  # of the loss of any source
    norm: float
    gradient: float  # L2, of the worst parameter
    parameter: str


def errors(found: SimpleNamespace, wanted: SimpleNamespace) -> Errors:
    """Compares what a run did with what the plain model did; both as `tests.support.training.train` returns it."""
    assert found.gradients.keys() == wanted.gradients.keys(), found.gradients.keys() ^ wanted.gradients.keys()
    gradients = {name: relative(found.gradients[name], wanted.gradients[name]) for name in wanted.gradients}
    worst = max(gradients, key=gradients.__getitem__)
    loss, norm = (
        max(abs(a - b) / abs(b) for a, b in zip(getattr(found, name), getattr(wanted, name), strict=True))
        for name in ("losses", "norms")
    )
    sums, exact = np.array(found.by_source), np.array(wanted.by_source)  # [steps, sources, (loss sum, tokens)]
    assert (sums[..., 1] == exact[..., 1]).all(), (sums[..., 1], exact[..., 1])
    source = float((np.abs(sums - exact) / np.maximum(exact, 1e-30))[..., 0].max())
    return Errors(loss=loss, source=source, norm=norm, gradient=gradients[worst], parameter=worst)


class References:
    """Model folders and what the plain model does on given batches, each made once."""

    def __init__(self, root: Path):
        self._root = root
        self._results: dict[tuple[str, str], SimpleNamespace] = {}

    def get(self, name: str, options: dict) -> tuple[Path, SimpleNamespace]:
        folder = self._root / name
        if not folder.exists():
            save_model(name, folder)
        batches = step_batches(INDEX, STEPS, options)
        key = (name, str(batches))
        if key not in self._results:
            self._results[key] = reference(folder, INDEX, batches, OPTIM)
        return folder, self._results[key]


def table(cells: dict[tuple[str, str], Errors], families: list[str], layouts: list[str]) -> str:
    """Markdown: a row a layout, a column a family, in each cell the worst loss and gradient error."""
    lines = ["| | " + " | ".join(families) + " |", "|---" * (len(families) + 1) + "|"]
    for layout in layouts:
        found = [cells.get((name, layout)) for name in families]
        shown = [f"{cell.loss:.0e} / {cell.gradient:.0e}".replace("e-0", "e-") if cell else "-" for cell in found]
        if not any(found):
            continue
        lines.append(f"| {layout} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--layouts", nargs="+", default=[*LAYOUTS, *EXPERT_LAYOUTS])
    parser.add_argument("--backend", choices=("native", "te"), default="native", help="te: over a stand-in on the host")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    te = chosen.backend == "te"
    cells: dict[tuple[str, str], Errors] = {}
    with tempfile.TemporaryDirectory() as root, contextlib.closing(Pool(stand_in=te)) as pool:
        references = References(Path(root))
        for name in chosen.families:
            for layout, (ranks, degrees) in layouts_of(name).items():
                if layout in chosen.layouts:
                    folder, wanted = references.get(name, {})
                    options = ("fp32", "none", None, None, chosen.backend)
                    found = pool.run(train, ranks, folder, degrees, INDEX, STEPS, OPTIM, {}, *options)[0]
                    cells[name, layout] = errors(found, wanted)
                    print(name, layout, cells[name, layout], flush=True)
    print("\nworst error of a loss / of a parameter's gradient\n")
    experts = [name for name in chosen.families if name in EXPERTS]
    for families in ([name for name in chosen.families if name not in experts], experts):
        if families:
            print(table(cells, families, chosen.layouts) + "\n")


if __name__ == "__main__":
    main()
