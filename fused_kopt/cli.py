"""The command line: parses and dispatches. Exit codes: 0 success, 1 a failed check, 2 a wrong or impossible request."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import fused_kopt
from fused_kopt.commands import demo, info, verify
from fused_kopt.commands.common import RefusedError
from fused_kopt.commands.variants import OPTIMIZERS
from fused_kopt.execute import EXECUTORS

_AS_IS = argparse.RawDescriptionHelpFormatter
EXAMPLES = """examples:
  fused-kopt demo                                train with all eight optimizers, write the loss curves
  fused-kopt verify --optimizer adam --steps 20  compare Adam's kernels with the reference
  fused-kopt info                                what runs on this machine
exit codes: 0 success, 1 a check failed, 2 a wrong or impossible request"""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text}.")
    return value


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.lower().split(","))
    unknown = [name for name in names if name not in demo.OPTIMIZERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(map(repr, unknown))}. Choose from {','.join(demo.OPTIMIZERS)}.")
    return names


def _parser() -> argparse.ArgumentParser:
    about = "Keras optimizers for PyTorch tensors, fused into one Triton launch."
    parser = argparse.ArgumentParser("fused-kopt", description=about, epilog=EXAMPLES, formatter_class=_AS_IS)
    parser.add_argument("--version", action="version", version=f"fused-kopt {fused_kopt.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,verify,info}")
    d = commands.add_parser("demo", help="train a small network with all eight optimizers", description=demo.ABOUT, formatter_class=_AS_IS)
    d.add_argument("--epochs", type=_positive, default=demo.EPOCHS, help="passes over the training images, 22 steps each (%(default)s)")
    d.add_argument("--optimizers", type=_names, default=tuple(demo.OPTIMIZERS), help="comma-separated (all eight)", metavar="NAMES")
    d.add_argument("--out", type=Path, default=Path(), help="directory for fused_kopt_demo.png (the current one)", metavar="DIR")
    d.add_argument("--executor", choices=EXECUTORS[:3], default="auto", help="auto: triton where it imports, else reference")
    d.add_argument("--seed", type=int, default=0, help="of the initial weights and the batches (%(default)s)")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    v = commands.add_parser("verify", help="compare every executor with the reference", description=verify.ABOUT, formatter_class=_AS_IS)
    v.add_argument("--steps", type=_positive, default=3, help="steps per optimizer and dtype (%(default)s)")
    v.add_argument("--device", choices=devices, default=devices[-1], help="cuda only where torch finds one (%(default)s)")
    v.add_argument("--optimizer", type=str.lower, choices=OPTIMIZERS, help="only this one (all)")
    v.add_argument("--executor", choices=EXECUTORS[2:], default="triton", help="compiled builds 76 kernels, minutes at first (%(default)s)")
    commands.add_parser("info", help="versions, devices, executors", description="Print versions, devices and executors.")
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.command == "info":
        return info.info(console)
    if arguments.command == "verify":
        return verify.verify(arguments.steps, torch.device(arguments.device), arguments.optimizer, arguments.executor, console)
    settings = demo.Settings(arguments.optimizers, arguments.epochs, arguments.out, arguments.executor, arguments.seed)
    return demo.main(settings, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. `argv`: default sys.argv[1:]. Returns the exit code; SystemExit for --help, --version and wrong arguments."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments, Console())
    except RefusedError as refusal:
        Console(stderr=True).print(f"fused-kopt: {refusal}", markup=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
