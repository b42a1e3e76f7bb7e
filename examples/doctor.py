"""What this node has and lacks for training: libraries, devices, limits, and which layers a run would use and why."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from pathlib import Path

# library -> what a node without it cannot do; None for nothing at all
LIBRARIES = {
    "torch": None,
    "megatron-core": None,
    "transformers": None,
    "safetensors": None,
    "datasets": None,
    "numpy": None,
    "pyyaml": None,
    "rich": None,
    "tyro": None,
    "xxhash": None,
    "transformer-engine": "layers of Transformer Engine and --precision fp8: native layers run instead",
    "tensorboard": "mirrors of metrics.jsonl for TensorBoard",
    "wandb": "--log.wandb",
}


def installed(library: str) -> str | None:
    """The version of a library, None where it is not there."""
    from importlib import metadata

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def not_installed(library: str) -> str:
    """The sentence about a library that every run needs."""
    return f"{library} is not installed and nothing trains without it: pip install -e ."


def library_lines() -> tuple[list[str], list[str]]:
    """Every library with its version, and what is lacking, a sentence each."""
    lines, lacking = [f"python {platform.python_version()}"], []
    for library, without in LIBRARIES.items():
        version = installed(library)
        if version is not None:
            lines.append(f"{library} {version}")
        elif without is None:
            lacking.append(not_installed(library))
        else:
            lines.append(f"{library} is not installed; missing: {without}")
    return lines, lacking


def not_imported(error: ImportError) -> str:
    """Why something does not import: a library that is not there at all, or one that is broken."""
    library = (error.name or "").split(".")[0]
    if isinstance(error, ModuleNotFoundError) and library and importlib.util.find_spec(library) is None:
        return not_installed(library)
    return f"a library is installed and does not import: {error}"


def device_lines(model: Path | None, precision: str) -> tuple[list[str], list[str]]:
    """GPUs, and the layers that a run would use with the reason; what is lacking.

    ValueError where no model is in the directory, or `precision` cannot run here.
    """
    import torch

    from engine.host import transformer_engine_fault
    from models.backend import choose_backend
    from models.layers.fused import compiler_fault

    cuda = torch.cuda.is_available()
    lacking = []
    if cuda:
        from torch.cuda import nccl

        lines = [f"GPU {number}: {torch.cuda.get_device_name(number)}" for number in range(torch.cuda.device_count())]
        lines.append(f"NCCL {'.'.join(map(str, nccl.version()))}")
        if fault := compiler_fault():
            lacking.append(fault)
    else:
        lines = ["no GPU is visible: ranks compute on the CPU, over gloo"]
        if Path("/dev/nvidiactl").exists():
            lacking.append(f"a driver is there, but torch {torch.__version__} sees no GPU: install torch for its CUDA")
    chosen, reason = choose_backend("auto", cuda=cuda, precision=precision, missing=transformer_engine_fault())
    lines.append(f"--backend auto chooses {chosen} in {precision}, because: {reason}")
    if model is not None:
        from models.hf_config import describe

        lines.append(f"{model}: a model of the family {describe(model).family}")
    return lines, lacking


def gpus_lacking(wanted: int) -> list[str]:
    """What to say where torch sees fewer GPUs than a run starts ranks."""
    import torch

    found = torch.cuda.device_count()
    return [] if found >= wanted else [f"torch sees {found} GPUs and {wanted} are wanted: leave this node out"]


def main(arguments: list[str] | None = None) -> int:
    """Prints what is here; exit status 1 where something is lacking without which a run fails or may fail."""
    parser = argparse.ArgumentParser(prog="lathe doctor", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs"), help="where RUN would be, for its disk")
    parser.add_argument("--model", type=Path, help="Hugging Face directory to train: is its family known?")
    parser.add_argument("--precision", choices=["bf16", "fp32", "fp8"], default="bf16", help="of the run")
    parser.add_argument("--ranks", type=int, default=8, help="of the whole run, for limits on sockets")
    parser.add_argument("--gpus", type=int, default=0, help="that this node must have at least")
    parser.add_argument("--brief", action="store_true", help="say only what is lacking, and of which node")
    flags = parser.parse_args(arguments)
    lines, lacking = library_lines()
    if not lacking:
        from engine.quiet import silence_libraries

        silence_libraries()
        try:
            from engine.guards.agreement import complaints

            lacking += complaints(flags.output, flags.ranks)
            devices, missing = device_lines(flags.model, flags.precision)
            missing += gpus_lacking(flags.gpus)
        except ImportError as error:  # installed is not all: its libraries may be another release's
            devices, missing = [], [not_imported(error)]
        except (ValueError, OSError) as error:
            devices, missing = [], [str(error)]
        lines += devices
        lacking += missing
    lines.append(f"{os.cpu_count()} CPU cores, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}")
    where = f"{platform.node()} " if flags.brief else ""
    if not flags.brief:
        print("\n".join(lines))
    for sentence in lacking:
        print(f"{where}lacking: {sentence}")
    print(f"{where or 'this node '}lacks nothing" if not lacking else f"{where}{len(lacking)} to mend")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
