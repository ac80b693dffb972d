"""`fused-kopt demo`: Keras's eight optimizers train a small convolutional network on scikit-learn's digits, in a custom training loop."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from fused_kopt import execute
from fused_kopt.commands.common import RefusedError, one_thread, require, why_not, writable
from fused_kopt.errors import FusedMismatchError
from fused_kopt.execute import Chosen, Executor
from fused_kopt.optimizer import Optimizer
from fused_kopt.optimizers import SGD, Adadelta, Adagrad, Adam, Adamax, Ftrl, Nadam, RMSprop
from fused_kopt.tape import GradientTape

EPOCHS, BATCH, TEST_IMAGES = 10, 64, 360
VERIFY_EVERY = 20
"""Steps between two that also run on copies through the reference."""
MIN_ACCURACY = 0.9
"""Fraction of the test images below which an optimizer counts as failed. All eight reached 0.94 to 0.98 with six seeds."""

# Learning rates by trial. Ftrl starts from an empty accumulator: with Keras's 0.1 its first step all but
# forgets the random initial weights (they shrink by the factor 1 - sqrt(0.1 / (0.1 + g^2))), and no network trains from zeros.
OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "sgd": lambda: SGD(0.1, momentum=0.9),
    "rmsprop": lambda: RMSprop(0.002, momentum=0.9),
    "adam": lambda: Adam(0.005),
    "adadelta": lambda: Adadelta(5.0),
    "adagrad": lambda: Adagrad(0.2),
    "adamax": lambda: Adamax(0.01),
    "nadam": lambda: Nadam(0.01),
    "ftrl": lambda: Ftrl(0.07, initial_accumulator_value=0.0),
}
_EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
ABOUT = f"""Train a small convolutional network on scikit-learn's digits with each optimizer, in a custom training loop.

Every {VERIFY_EVERY}th step also runs on copies through the reference. On a machine without a GPU the kernel runs in
Triton's interpreter, about a minute in all. Needs pip install 'fused-kopt[demo]'.
Exit code 1: a verified step differs from the reference, or a test accuracy is below {MIN_ACCURACY:.0%}.
Example: fused-kopt demo --optimizers adam,ftrl --epochs 5 --out /tmp"""


@dataclass(frozen=True)
class Settings:
    """What `fused-kopt demo` was asked for."""

    names: tuple[str, ...] = tuple(OPTIMIZERS)
    epochs: int = EPOCHS
    out: Path = Path()
    """Made where it does not exist."""
    executor: Executor = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """How one optimizer trained."""

    name: str
    optimizer: Optimizer
    losses: list[float]
    accuracy: float
    """Fraction of the test images classified correctly, after the last step."""
    steps_per_second: float
    """Forward, backward and optimizer, verified steps included."""
    launches: int
    """Kernel launches in the steps counted in `unverified`."""
    unverified: int
    """Steps after the first that were not verified: verifying launches once more, on copies."""
    verified: int


class Digits(NamedTuple):
    """Images: float32 [n, 1, 8, 8] in 0 to 1. Labels: int64 [n]."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(device: torch.device) -> Digits:
    """scikit-learn's 1797 handwritten digits, always in the same stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, test_images, labels, test_labels = train_test_split(
        data.images[:, None] / 16, data.target, test_size=TEST_IMAGES, random_state=0, stratify=data.target
    )
    numbers = (torch.tensor(x, dtype=torch.float32, device=device) for x in (images, test_images))
    classes = (torch.tensor(x, dtype=torch.int64, device=device) for x in (labels, test_labels))
    return Digits(next(numbers), next(classes), next(numbers), next(classes))


def network(seed: int) -> nn.Sequential:
    """3,706 weights in 6 variables, initialised from `seed`; leaves torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = [nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        second = [nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(96, 10))


def batches(count: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of the images of every step: each epoch in a new order, its incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count // BATCH * BATCH], BATCH)


def train(name: str, settings: Settings, executor: Chosen, data: Digits, advance: Callable[[], object]) -> Run:
    """Train one network with one optimizer. `advance` is called after every step.

    Raises FusedMismatchError where a verified step differs from the reference.
    """
    device = data.images.device
    model = network(settings.seed).to(device)
    variables = list(model.parameters())
    optimizer = OPTIMIZERS[name]()
    optimizer.executor = executor
    optimizer.verify_every = 0 if executor == "reference" else VERIFY_EVERY
    losses: list[Tensor] = []
    launches = unverified = 0
    start = time.perf_counter()
    for step, batch in enumerate(batches(len(data.labels), settings.epochs, settings.seed), 1):
        images, labels = data.images[batch.to(device)], data.labels[batch.to(device)]
        before = execute.stats().launches
        with GradientTape() as tape:
            loss = functional.cross_entropy(model(images), labels)
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        if step > 1 and not (optimizer.verify_every and step % optimizer.verify_every == 0):
            launches += execute.stats().launches - before
            unverified += 1
        losses.append(loss.detach())
        advance()
    curve = torch.stack(losses).tolist()  # waits for the device, so before the clock is read
    rate = len(losses) / (time.perf_counter() - start)
    verified = len(losses) // optimizer.verify_every if optimizer.verify_every else 0
    return Run(name, optimizer, curve, accuracy(model, data), rate, launches, unverified, verified)


def accuracy(model: nn.Module, data: Digits) -> float:
    """The fraction of the test images that the model classifies correctly."""
    with torch.no_grad():
        return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Means of the last `window` losses at every step; of fewer at the beginning."""
    return [sum(losses[max(0, i - window) : i]) / min(i, window) for i in range(1, len(losses) + 1)]


def plot(runs: Sequence[Run], window: int, path: Path, title: str) -> None:
    """Write the loss curves, each point the mean of `window` steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(runs):
        curve = smoothed(run.losses, window)
        label = f"{type(run.optimizer).__name__}  ({run.accuracy:.1%})"
        axes.plot(range(1, len(curve) + 1), curve, label=label, color=f"C{index}", linestyle="-" if index % 2 else "--", linewidth=1.6)
    axes.set(xlabel="step", ylabel=f"training loss, mean of the last {window} steps (1 epoch)", yscale="log", title=title)
    axes.grid(True, which="both", linewidth=0.3, alpha=0.6)
    axes.legend(title="optimizer  (test accuracy)", loc="upper right", ncols=2)
    figure.savefig(path)


def report(runs: Sequence[Run], executor: str, title: str) -> Table:
    """The table of all runs."""
    caption = "steps/s with forward, backward and verification; launches without verification"
    table = Table("optimizer", title=title, caption=caption)
    for heading in ("learning\nrate", "test\naccuracy", "steps/s", "launches\nper step", "verified\nsteps"):
        table.add_column(heading, justify="right")
    table.add_column("executor")
    for run in runs:
        colour = "green" if run.accuracy >= MIN_ACCURACY else "red"
        launches = f"{run.launches / run.unverified:.3g}" if run.unverified else "-"
        numbers = (f"{float(run.optimizer.learning_rate):g}", f"[{colour}]{run.accuracy:.1%}[/]", f"{run.steps_per_second:.0f}")
        table.add_row(run.name, *numbers, launches, str(run.verified) if run.optimizer.verify_every else "-", executor)
    return table


def main(settings: Settings, console: Console) -> int:
    """Train with every optimizer named, print the table and write the curves.

    Returns 0; or 1 if a verified step differs from the reference or an accuracy is below MIN_ACCURACY.
    Raises RefusedError where an executor or a package is unavailable, or the directory cannot be made.
    """
    if (reason := why_not(settings.executor)) is not None:
        raise RefusedError(f"--executor {settings.executor}: {reason}")
    require("the demo", _EXTRA)
    writable(settings.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # on a CPU too, so that the demo runs the kernel's text: "auto" in the library prefers the faster reference there
    fused = settings.executor != "reference" and (settings.executor == "triton" or execute.why_not_triton() is None)
    executor = execute.choose("triton" if fused else "reference", device)
    data = digits(device)
    runs = []
    with one_thread(), Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(settings.names) * settings.epochs * (len(data.labels) // BATCH))
        for name in settings.names:
            progress.update(task, description=name)
            try:
                runs.append(train(name, settings, executor, data, lambda: progress.advance(task)))
            except FusedMismatchError as error:
                console.print(f"[red]{name} failed verification.[/]")
                console.print(str(error), markup=False)
                return 1
    title = f"Digits: {len(data.labels)} training images, epochs: {settings.epochs}, seed: {settings.seed}, device: {device}"
    console.print(report(runs, executor, title))
    path = settings.out / "fused_kopt_demo.png"
    plot(runs, len(data.labels) // BATCH, path, title)
    console.print(f"loss curves: {path}", soft_wrap=True)
    failed = [run.name for run in runs if not run.accuracy >= MIN_ACCURACY]
    if failed:
        console.print(f"[red]Failed to reach a test accuracy of {MIN_ACCURACY:.0%}: {', '.join(failed)}[/]")
    return 1 if failed else 0
