"""Workloads: the shapes of real models' variables, without model code, and how they are sampled down."""

from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]
LEAST_TENSORS = 8  # sampling keeps so many tensors; from there on it divides first dimensions


class Workload(NamedTuple):
    """A list of shapes, given as (count, shape) groups."""

    title: str
    groups: tuple[tuple[int, Shape], ...]

    @property
    def shapes(self) -> list[Shape]:
        """One shape per tensor."""
        return [shape for count, shape in self.groups for _ in range(count)]


class Sampled(NamedTuple):
    """What remains of a workload. `sample` says how much: all, or tensors/k (every k-th), rows/k (first dimensions divided), or both."""

    sample: str
    shapes: list[Shape]


def elements(shapes: list[Shape]) -> int:
    """The number of elements of all tensors together."""
    return sum(prod(shape) for shape in shapes)


def sampled(shapes: list[Shape], factor: int) -> Sampled:
    """About one element in `factor`, a power of two: fewer tensors, and where too few would remain, fewer rows of them."""
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"`factor` must be a power of two. Received: factor={factor}.")
    tensors = factor
    while tensors > 1 and len(shapes) < LEAST_TENSORS * tensors:
        tensors //= 2
    rows = factor // tensors
    kept = [(max(1, shape[0] // rows), *shape[1:]) for shape in shapes[::tensors]]
    parts = [f"{what}/{divisor}" for what, divisor in (("tensors", tensors), ("rows", rows)) if divisor > 1]
    return Sampled(" ".join(parts) or "all", kept)


def _resnet50() -> tuple[tuple[int, Shape], ...]:
    """torchvision's: per bottleneck three convolutions with two vectors each, and a projection in each stage's first block."""
    groups: list[tuple[int, Shape]] = [(1, (64, 3, 7, 7)), (2, (64,))]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        groups += [(1, (width, inputs, 1, 1)), (blocks - 1, (width, outputs, 1, 1))]
        groups += [(blocks, (width, width, 3, 3)), (blocks, (outputs, width, 1, 1)), (4 * blocks, (width,)), (2 * blocks, (outputs,))]
        groups += [(1, (outputs, inputs, 1, 1)), (2, (outputs,))]
        inputs = outputs
    return (*groups, (1, (1000, 2048)), (1, (1000,)))


def _transformer(vectors: int, squares: int, layers: int, width: int) -> tuple[tuple[int, Shape], ...]:
    """The encoder's part of BERT: squares include queries, keys and values, and the pooler."""
    wide = 4 * width
    inner = ((layers, (wide, width)), (layers, (wide,)), (layers, (width, wide)))
    return ((vectors, (width,)), (squares, (width, width)), *inner, (1, (30522, width)), (1, (512, width)), (1, (2, width)))


def _gpt2(vectors: int, layers: int, width: int) -> tuple[tuple[int, Shape], ...]:
    """GPT-2, also the middle of ViT: queries, keys and values in one tensor."""
    wide = 4 * width
    inner = ((layers, (3 * width, width)), (layers, (3 * width,)), (layers, (width, width)), (layers, (wide, width)))
    return ((vectors, (width,)), *inner, (layers, (wide,)), (layers, (width, wide)))


VIT = ((1, (1, 1, 768)), (1, (1, 197, 768)), (1, (768, 3, 16, 16)), (1, (1000, 768)), (1, (1000,)))
LLAMA_SHARD = ((65, (512,)), (64, (512, 4096)), (64, (128, 4096)), (64, (1792, 4096)), (32, (512, 14336)), (2, (16032, 4096)))
LLAMA = ((65, (4096,)), (64, (4096, 4096)), (64, (1024, 4096)), (64, (14336, 4096)), (32, (4096, 14336)), (2, (128256, 4096)))
MOE = (
    *((3328, (176, 2048)), (1664, (256, 1408)), (52, (352, 2048)), (27, (384, 2048)), (27, (72, 2048)), (27, (512, 512))),
    *((27, (256, 2048)), (26, (8, 2048)), (26, (256, 2816)), (55, (256,)), (27, (64,)), (2, (12800, 2048)), (2, (1368, 2048))),
    (1, (256, 10944)),
)
LORA = ((192, (16, 4096)), (96, (4096, 16)), (64, (1024, 16)), (64, (14336, 16)), (32, (16, 14336)))

WORKLOADS: dict[str, Workload] = {
    "W1": Workload("ResNet-50", _resnet50()),
    "W2": Workload("ViT-B/16", _gpt2(75, 12, 768) + VIT),
    "W3": Workload("BERT-base", _transformer(111, 49, 12, 768)),
    "W4": Workload("BERT-large", _transformer(219, 97, 24, 1024)),
    "W5": Workload("GPT-2 124M", (*_gpt2(74, 12, 768), (1, (50257, 768)), (1, (1024, 768)))),
    "W6": Workload("GPT-2 1.5B", (*_gpt2(290, 48, 1600), (1, (50257, 1600)), (1, (1024, 1600)))),
    "W7": Workload("Llama-3-8B, 1 layer", ((2, (4096, 4096)), (2, (1024, 4096)), (2, (14336, 4096)), (1, (4096, 14336)), (2, (4096,)))),
    "W8": Workload("Llama-3-8B, 1/8 shard", LLAMA_SHARD),
    "W9": Workload("Llama-3-8B", LLAMA),
    "W10": Workload("5,000 tiny", tuple((1000, (n,)) for n in (17, 64, 256, 1000, 4096))),
    "W11": Workload("10,000 x 64", ((10_000, (64,)),)),
    "W12": Workload("one of 2^31 + 2^20", ((1, (2**31 + 2**20,)),)),
    "W13": Workload("mixture of experts, 1/8 shard", MOE),
    "W14": Workload("LoRA on Llama-3-8B", LORA),
    "W15": Workload("one of 2^30", ((1, (2**30,)),)),
    # sizes that others have published times for, and the two of the CPU targets
    "200x1M": Workload("200 x 1M", ((200, (1_000_000,)),)),
    "10x16.8M": Workload("10 x 16.8M", ((10, (2**24,)),)),
    "1000x1024": Workload("1,000 x 1,024", ((1000, (1024,)),)),
    "32x2048x2048": Workload("32 x 2,048 x 2,048", ((32, (2048, 2048)),)),
    "25x1M": Workload("25 x 1M", ((25, (1_000_000,)),)),
    "1x25M": Workload("1 x 25M", ((1, (25_000_000,)),)),
    "5000x64": Workload("5,000 x 64", ((5000, (64,)),)),
    "200x640": Workload("200 small, vectors and matrices", ((100, (64,)), (100, (64, 19)))),
    # host time over the number of tensors, together with W11
    "1x64": Workload("1 x 64", ((1, (64,)),)),
    "10x64": Workload("10 x 64", ((10, (64,)),)),
    "100x64": Workload("100 x 64", ((100, (64,)),)),
    "1000x64": Workload("1,000 x 64", ((1000, (64,)),)),
}
MODELS = tuple(f"W{i}" for i in range(1, 16))
REPLICAS = ("200x1M", "10x16.8M", "1000x1024", "32x2048x2048", "25x1M", "1x25M", "5000x64", "200x640")
KERAS3 = ("200x640", "25x1M")  # where Keras 3's classes are compared with ours in their place
SWEEP = ("1x64", "10x64", "100x64", "1000x64", "W11")
