"""Small real tasks for `fused-kopt precision`: a network, its data, and a loss of given weights, in any floating dtype."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fused_kopt.commands import demo

Weights = Mapping[str, Tensor]
BATCH = 32
"""Samples of a step."""
HELD_OUT = 512
"""Sequences that `language` is evaluated on; `digits` has its own test images."""
CONTEXT, WIDTH, HEADS, LAYERS = 32, 48, 2, 2
"""Of the language model: characters in, size of their vectors, heads and layers of attention."""


@dataclass(frozen=True)
class Task:
    """What is learned. Weights are by name, of one dtype, in which everything is computed."""

    name: str
    title: str
    inputs: Tensor
    """Samples to train on: float32, or int64 characters."""
    labels: Tensor
    """int64: a class for each sample, or the next character at each position."""
    held_out: tuple[Tensor, Tensor]
    """Inputs and labels that are never trained on."""
    model: Callable[[], nn.Module]
    """A float32 network with weights from torch's generator."""

    def initial(self, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
        """The network and its float32 weights of a seed; leaves torch's global generator as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model()
        return model, {name: parameter.detach() for name, parameter in model.named_parameters()}

    def batches(self, steps: int, seed: int) -> Iterator[Tensor]:
        """The positions of each step's samples, drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(len(self.labels), (BATCH,), generator=generator) for _ in range(steps))

    def loss(self, model: nn.Module, weights: Weights, batch: Tensor) -> Tensor:
        """The mean cross-entropy of a batch, in the weights' dtype."""
        return functional.cross_entropy(_flat(_outputs(model, weights, self.inputs[batch])), self.labels[batch].flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, weights: Weights) -> tuple[float, float]:
        """The mean cross-entropy, in nats, and the fraction predicted correctly, of what is held out."""
        inputs, labels = self.held_out
        outputs, labels = _flat(_outputs(model, weights, inputs)), labels.flatten()
        return float(functional.cross_entropy(outputs, labels)), float((outputs.argmax(1) == labels).double().mean())


def _outputs(model: nn.Module, weights: Weights, inputs: Tensor) -> Tensor:
    dtype = next(iter(weights.values())).dtype
    outputs: Tensor = functional_call(model, dict(weights), (inputs.to(dtype) if inputs.is_floating_point() else inputs,))
    return outputs


def _flat(outputs: Tensor) -> Tensor:
    return outputs.reshape(-1, outputs.shape[-1])


class Block(nn.Module):
    """A layer of a transformer: attention to what came before, then two linear maps. Source: A. Radford et al., GPT-2, 2019."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, width] to the same."""
        batch, length, width = x.shape
        split = self.attend(self.first(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind()
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.join(seen.transpose(1, 2).reshape(batch, length, width))
        added: Tensor = x + self.narrow(functional.gelu(self.widen(self.second(x))))
        return added


class Transformer(nn.Module):
    """A language model over characters: int64 [batch, positions] to the next one's logits [batch, positions, characters]."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits at every position, of what follows it."""
        logits: Tensor = self.head(self.layers(self.embed(characters) + self.place.weight[: characters.shape[1]]))
        return logits


def digits() -> Task:
    """scikit-learn's handwritten digits and the demo's network: 3,706 weights, 10 classes."""
    data = demo.digits(torch.device("cpu"))
    held_out = data.test_images, data.test_labels
    return Task("digits", "scikit-learn's digits, a small convolutional network", data.images, data.labels, held_out, _network)


def _network() -> nn.Module:
    return demo.network(int(torch.randint(1 << 31, ())))


def language() -> Task:
    """The Python language reference, which every Python carries for its `help()`, character by character."""
    from pydoc_data import topics

    text = "".join(topics.topics.values())
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([alphabet[character] for character in text])
    samples = numbers[: len(numbers) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    # every so many sequences one is held out, so that both parts are of the same text
    apart = torch.arange(len(samples)) % (len(samples) // HELD_OUT) == 0
    train, held_out = samples[~apart], samples[apart]
    title = "Python's language reference, a small transformer over characters"
    parts = train[:, :-1], train[:, 1:], (held_out[:, :-1], held_out[:, 1:])
    return Task("language", title, *parts, lambda: Transformer(len(alphabet)))


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "language": language}
