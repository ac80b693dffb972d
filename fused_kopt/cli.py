"""The command line: parses and dispatches. Exit codes: 0 success, 1 a failed check, 2 a wrong or impossible request."""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console

import fused_kopt
from fused_kopt.checkpoint import formats
from fused_kopt.checkpoint.formats import Hints
from fused_kopt.commands import convert, demo, doctor, experiment, explain, inspect, plan, precision, tasks, tune, variants, verify
from fused_kopt.commands.architectures import ARCHITECTURES
from fused_kopt.commands.common import RefusedError
from fused_kopt.commands.machines import MACHINES
from fused_kopt.commands.models import CATALOGUE
from fused_kopt.commands.variants import DTYPES, OPTIMIZERS
from fused_kopt.execute import EXECUTORS
from fused_kopt.precision import NAMED

_AS_IS = argparse.RawDescriptionHelpFormatter
EXAMPLES = """examples:
  fused-kopt demo                                train with all eight optimizers, write the loss curves
  fused-kopt precision --task digits             loss, weight error and bytes of every precision policy
  fused-kopt verify --optimizer adam --steps 20  compare Adam's kernels with the reference
  fused-kopt doctor                              what runs on this machine, what is wrong, how to mend it
  fused-kopt explain --optimizer adam            what Adam's kernels are made of
  fused-kopt tune --optimizer adam               the fastest block size and warps on this GPU
  fused-kopt plan --model llama-3-8b --gpus 64   what each of 64 GPUs holds, sends and waits for
  fused-kopt inspect run.h5                      what is in a checkpoint
  fused-kopt convert run.h5 run.safetensors      an optimizer's state from Keras's file to fused_kopt's
exit codes: 0 success, 1 a check failed, 2 a wrong or impossible request"""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text}.")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0. Received: {text}.")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1]. Received: {text}.")
    return value


def _gpu(text: str) -> str:
    if not re.fullmatch(r"cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cuda or cuda:N. Received: {text}.")
    return text


def _names(choices: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated names."""
    allowed = tuple(choices)

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.lower().split(","))
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(map(repr, unknown))}. Choose from {','.join(allowed)}.")
        return names

    return parse


def _parser() -> argparse.ArgumentParser:
    about = "Keras optimizers for PyTorch tensors, fused into one Triton launch."
    parser = argparse.ArgumentParser("fused-kopt", description=about, epilog=EXAMPLES, formatter_class=_AS_IS)
    parser.add_argument("--version", action="version", version=f"fused-kopt {fused_kopt.__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{demo,precision,verify,doctor,explain,tune,plan,inspect,convert}"
    )
    add = functools.partial(commands.add_parser, formatter_class=_AS_IS)
    _demo(add("demo", help="train a small network with all eight optimizers", description=demo.ABOUT))
    _precision(add("precision", help="train under every precision policy, beside float64", description=precision.ABOUT))
    _verify(add("verify", help="compare every executor with the reference", description=verify.ABOUT))
    add("doctor", help="examine this install: versions, devices, executors", description=doctor.ABOUT)
    _explain(add("explain", help="compile kernels without a GPU and read their machine code", description=explain.ABOUT))
    _tune(add("tune", help="find the fastest launch configuration on this GPU", description=tune.ABOUT))
    _plan(add("plan", help="memory, bytes on the wire and step time on many GPUs", description=plan.ABOUT))
    _inspect(add("inspect", help="print what is in a checkpoint", description=inspect.ABOUT))
    _convert(add("convert", help="convert an optimizer's state between frameworks", description=convert.ABOUT))
    return parser


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="the checkpoint", metavar="FILE")
    _checkpoint(parser)


def _convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, help="the file to read", metavar="SOURCE")
    add("target", type=Path, help="the file to write", metavar="TARGET")
    add("--to", choices=formats.FORMATS, help="the target's format (by its suffix)")
    variables = parser.add_mutually_exclusive_group()
    variables.add_argument("--names", type=_texts, default=(), help="the variables' names in the file's order, or old=new,...")
    variables.add_argument("--model", help="a function whose model the names and shapes are of", metavar="MODULE:FUNCTION")
    _checkpoint(parser)
    add("--dry-run", action="store_true", help="print the table, write nothing")


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", type=str.lower, help="the class that .npz and .weights.h5 do not name", metavar="NAME")


def _texts(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _demo(parser: argparse.ArgumentParser) -> None:
    add, names = parser.add_argument, tuple(demo.OPTIMIZERS)
    add("--epochs", type=_positive, default=demo.EPOCHS, help="passes over the training images, 22 steps each (%(default)s)")
    add("--optimizers", type=_names(names), default=names, help="comma-separated (all eight)", metavar="NAMES")
    add("--out", type=Path, default=Path(), help="directory for fused_kopt_demo.png (the current one)", metavar="DIR")
    add("--executor", choices=EXECUTORS[:3], default="auto", help="auto: triton where it imports, else reference")
    add("--seed", type=int, default=0, help="of the initial weights and the batches (%(default)s)")


def _precision(parser: argparse.ArgumentParser) -> None:
    add, policies = parser.add_argument, tuple(experiment.POLICIES)
    add("--task", choices=tasks.TASKS, default="digits", help="(%(default)s)")
    add("--optimizer", type=str.lower, choices=experiment.OPTIMIZERS, default="adam", help="(%(default)s)", metavar="NAME")
    add("--policies", type=_names(policies), default=policies, help=f"comma-separated, of {', '.join(policies)} (all)", metavar="NAMES")
    add("--steps", type=_positive, default=precision.STEPS, help="of each run (%(default)s)")
    add("--seeds", type=_positive, default=precision.SEEDS, help="runs of each policy (%(default)s)")
    add("--output", type=Path, default=precision.PICTURE, help="the picture, .png or .svg (%(default)s)", metavar="FILE")
    add("--rows", type=Path, help="a CSV file to add a line for each run to", metavar="FILE")


def _verify(parser: argparse.ArgumentParser) -> None:
    add, devices = parser.add_argument, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    add("--steps", type=_positive, default=3, help="steps per optimizer and dtype (%(default)s)")
    add("--device", choices=devices, default=devices[-1], help="cuda only where torch finds one (%(default)s)")
    add("--optimizer", type=str.lower, choices=OPTIMIZERS, help="only this one (all)")
    add("--executor", choices=EXECUTORS[2:], default="triton", help="compiled builds 76 kernels, minutes at first (%(default)s)")


def _explain(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--arch",
        type=_names(ARCHITECTURES),
        default=("sm_90",),
        help=f"comma-separated, of {', '.join(ARCHITECTURES)} (sm_90)",
        metavar="NAMES",
    )
    _kernels(parser)
    add("--clipped", action="store_true", help="also the kernels that unscale and clip gradients")
    add("--bandwidth", type=_rate, help="of the memory (see the table's caption)", metavar="GB/S")


def _tune(parser: argparse.ArgumentParser) -> None:
    _kernels(parser)
    parser.add_argument("--device", type=_gpu, default="cuda", help="cuda or cuda:1 and so on (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(), help=f"directory for {tune.PICTURE} (the current one)", metavar="DIR")


def _plan(parser: argparse.ArgumentParser) -> None:
    add, dtypes = parser.add_argument, tuple(DTYPES)
    add("--model", required=True, help=f"{', '.join(CATALOGUE)}; a config.json; or parameters, such as 7e9")
    add("--gpus", type=_positive, default=8, help="in all (%(default)s)", metavar="N")
    add("--gpus-per-node", type=_positive, default=8, help="joined by links; nodes by a network (%(default)s)", metavar="N")
    add("--gpu", type=str.lower, choices=MACHINES, default="h100", help="(%(default)s)")
    add(
        "--zero", type=str.lower, choices=plan.ZERO, default="1", help="divided: nothing, slots, gradients too, variables too (%(default)s)"
    )
    add("--precision", choices=NAMED, default="bf16_split", help="the policy of slots and masters (%(default)s)")
    add("--variables", choices=dtypes, help="(bfloat16; float32 under --precision float32)")
    add("--gradients", choices=dtypes, help="(as the variables)")
    add("--optimizer", type=str.lower, choices=OPTIMIZERS, default="adam", help="(%(default)s)")
    add("--model-parallel", type=_positive, default=1, help="GPUs that hold one copy of the model together (%(default)s)", metavar="N")
    add("--tokens", type=_positive, default=plan.TOKENS, help="of a step's batch, for each GPU (%(default)s)", metavar="N")
    add("--mfu", type=_share, default=plan.MFU, help="the share of the peak that the passes reach (%(default)s)", metavar="SHARE")
    add("--ring", choices=plan.RINGS, default="hierarchical", help="how collectives go between nodes (%(default)s)")
    add("--link", type=_rate, help="of a GPU to its node, one way (the GPU's)", metavar="GB/S")
    add("--network", type=_rate, help="of a GPU to other nodes, one way (the GPU's)", metavar="GB/S")
    add("--json", action="store_true", dest="as_json", help="print bytes and seconds as JSON")


def _kernels(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--optimizer", type=str.lower, choices=OPTIMIZERS, help="only this one (all)")
    add("--dtype", type=_names(DTYPES), default=("float32",), help=f"comma-separated, of {', '.join(DTYPES)} (float32)", metavar="NAMES")
    add("--elements", type=_positive, default=variants.ELEMENTS, help="elements of the variable (%(default)s)", metavar="N")


def _run(arguments: argparse.Namespace, console: Console) -> int:
    a = arguments
    if a.command == "doctor":
        return doctor.doctor(console)
    if a.command == "verify":
        return verify.verify(a.steps, torch.device(a.device), a.optimizer, a.executor, console)
    if a.command == "precision":
        settings = precision.Settings(a.task, a.optimizer, a.policies, a.steps, a.seeds, a.output, a.rows)
        return precision.main(settings, console)
    if a.command == "plan":
        return plan.plan(plan.Settings(**{name: value for name, value in vars(a).items() if name != "command"}), console)
    if a.command == "inspect":
        return inspect.inspect(a.file, Hints(optimizer=a.optimizer), console)
    if a.command == "convert":
        return convert.convert(convert.Settings(a.source, a.target, a.to, a.names, a.model, a.optimizer, a.dry_run), console)
    if a.command in ("explain", "tune"):
        dtypes = tuple(DTYPES[name] for name in a.dtype)
    if a.command == "tune":
        return tune.tune(tune.Settings(a.optimizer, dtypes, a.elements, a.device, a.out), console)
    if a.command == "explain":
        return explain.explain(explain.Settings(a.arch, a.optimizer, dtypes, a.clipped, a.elements, a.bandwidth), console)
    return demo.main(demo.Settings(a.optimizers, a.epochs, a.out, a.executor, a.seed), console)


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
