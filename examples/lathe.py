"""One entry beside the scripts: `lathe COMMAND ...` is the script of that command with the flags that follow.

A recipe may stand before the flags of prepare, train, average, to-hf and evaluate: each reads what is its own there.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path

from examples.flags import take_flag

# command -> (module, what it does)
COMMANDS = {
    "prepare": ("examples.prepare_data", "rows of conversations into tokens and supervised spans"),
    "inspect-data": ("examples.inspect_data", "documents of prepared data, their supervised tokens marked"),
    "train": ("examples.pretrain_sft", "one process, or --nproc N of them on this node"),
    "average": ("checkpoint_tools.average_steps", "several checkpoints of a run into their mean"),
    "to-hf": ("checkpoint_tools.mcore_to_hf", "a checkpoint into a Hugging Face directory"),
    "to-mcore": ("checkpoint_tools.hf_to_mcore", "a Hugging Face directory into a checkpoint"),
    "inspect": ("checkpoint_tools.inspect_checkpoint", "what a checkpoint or a Hugging Face directory holds"),
    "compare": ("checkpoint_tools.inspect_checkpoint", "how two of them differ, tensor by tensor"),
    "evaluate": ("examples.evaluate", "answers of a Hugging Face model, graded"),
    "publish": ("checkpoint_tools.publish", "a Hugging Face directory onto a hub, with a model card"),
    "doctor": ("examples.doctor", "what this node has and lacks, and which layers a run would use"),
    "plan": ("examples.plan_run", "what each rank of a run will hold in memory"),
    "sweep": ("examples.lr_sweep", "several learning rates beside each other"),
    "submit": ("examples.submit", "a run's workflow into the queue of a SLURM cluster"),
    "jobs": ("examples.jobs", "how the jobs of a run stand there, and why one ended"),
}
# What torchrun passes on to its ranks: its default, and what SLURM's --signal and preemption may send, of which it
# would die alone.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def usage() -> str:
    lines = [f"  {command:<14}{does}" for command, (_, does) in COMMANDS.items()]
    return "\n".join(["usage: lathe COMMAND [recipe.yaml] [flags], and lathe COMMAND --help for its flags", "", *lines])


def take_processes(arguments: list[str]) -> tuple[int | None, list[str]]:
    """Takes `--nproc N` out of the arguments; ValueError where N is no number of processes."""
    value, rest = take_flag(arguments, "--nproc")
    if value is None:
        return None, rest
    if not value.isdecimal() or not int(value):
        raise ValueError(f"--nproc {value}: give how many processes this node starts")
    return int(value), rest


def train(arguments: list[str]) -> int:
    """Replaces this process by the training script, or by the torchrun that starts it N times."""
    from examples.pretrain_sft import parse_or_refuse

    processes, flags = take_processes(arguments)
    script = Path(__file__).with_name("pretrain_sft.py")
    command = [sys.executable, str(script), *flags]
    if processes is not None:
        config = parse_or_refuse(flags, 0, processes)  # what is mistyped is said once, before processes start
        if isinstance(config, int):
            return config
        torchrun = ["-m", "torch.distributed.run", "--signals-to-handle", SIGNALS, "--nproc-per-node", str(processes)]
        command = [sys.executable, *torchrun, str(script), *flags]
    sys.stdout.flush()
    os.execv(command[0], command)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status. A user's mistake is one sentence and exit status 2."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
        print(f"error: lathe has no command {command}; the nearest is {nearest}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        if command == "train":
            return train(rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    two_paths = len(rest) >= 2 and not any(word.startswith("-") for word in rest[:2])
    if command == "compare" and not two_paths and not {"-h", "--help"} & set(rest):
        print("error: lathe compare takes two paths first: lathe compare PATH OTHER", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[command][0])
    sys.argv[0] = f"lathe {command}"  # which help and errors show
    if module.__name__.startswith("checkpoint_tools."):
        from checkpoint_tools.common import run_script
        from engine.cli import SECTIONS

        section = command.replace("-", "_")
        return run_script(module.main, rest, section=section if section in SECTIONS else "")
    return module.main(rest)


if __name__ == "__main__":
    sys.exit(main())
