"""A program that saves, resumes and converts optimizer state."""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import nn
from typing_extensions import assert_type

import fused_kopt
from fused_kopt import checkpoint
from fused_kopt.checkpoint import Checkpoint, Hints
from fused_kopt.errors import CheckpointError
from fused_kopt.optimizers import Optimizer

folder = Path(mkdtemp())
model = nn.Linear(3, 2)
optimizer = fused_kopt.Adam(0.1)
optimizer.apply_gradients([(torch.ones_like(v), v) for v in model.parameters()])
checkpoint.save(folder / "run.safetensors", optimizer, model.named_parameters(), with_values=True)
checkpoint.load(str(folder / "run.safetensors"), optimizer, dict(model.named_parameters()), settings=False)

taken = checkpoint.capture(optimizer, model.named_parameters())
assert_type(taken, Checkpoint)
assert_type(taken.slots["weight"]["m"], torch.Tensor)
assert_type(checkpoint.new_optimizer(taken), Optimizer)
checkpoint.restore(checkpoint.renamed(taken, {}), optimizer, model.named_parameters())
assert_type(checkpoint.to_state_dict(taken), dict[str, Any])
checkpoint.from_state_dict(checkpoint.to_state_dict(taken))
weights = checkpoint.to_weights(taken, model.named_parameters())
checkpoint.from_weights(weights, "Adam", model.named_parameters())
checkpoint.write(folder / "run.pt", taken)
try:
    assert_type(checkpoint.read(folder / "run.pt", Hints(["weight", "bias"])), Checkpoint)
except CheckpointError as error:
    print(error)


def wrong() -> None:
    """Never called: mistakes that a type checker finds."""
    checkpoint.save(3, optimizer, model.named_parameters())  # wrong: arg-type
    checkpoint.save("run.safetensors", optimizer, model.parameters())  # wrong: arg-type
    checkpoint.load("run.safetensors", model, model.named_parameters())  # wrong: arg-type
    checkpoint.restore({}, optimizer, model.named_parameters())  # wrong: arg-type
    taken.iterations = 3  # wrong: misc
