"""A program that trains with fused_kopt's own classes."""

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fused_kopt
from fused_kopt import GradientTape, errors, optimizers
from fused_kopt.optimizers import Optimizer, schedules

model = nn.Linear(3, 2)
variables = list(model.parameters())
x = torch.ones(4, 3)


def loss() -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]  # nn.Module returns Any


every: list[Optimizer] = [
    fused_kopt.SGD(0.1, momentum=0.9, nesterov=True, clipnorm=1.0),
    fused_kopt.RMSprop(learning_rate=np.float32(0.1), rho=0.8, centered=True),
    fused_kopt.Adam(schedules.ExponentialDecay(0.1, 10, 0.5, staircase=True), amsgrad=True),
    fused_kopt.Adadelta(lambda: 0.5, executor="reference"),
    fused_kopt.Adagrad(0.1, initial_accumulator_value=0.2, global_clipnorm=1.0),
    fused_kopt.Adamax(0.1, beta_1=0.8, decay=0.01),
    fused_kopt.Nadam(name="mine"),
    fused_kopt.Ftrl(0.1, l1_regularization_strength=0.01, clipvalue=0.5),
    fused_kopt.Lion(torch.tensor(0.1), verify_every=2),
]
for optimizer in every:
    with GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, variables)
    assert_type(optimizer.apply_gradients(zip(gradients, variables, strict=True)), Tensor | None)
    optimizer.minimize(loss, variables)
    assert_type(optimizer.get_slot_names(), list[str])
    assert_type(optimizer.weights, list[Tensor])
    assert_type(int(optimizer.iterations), int)
    again = optimizers.get(optimizers.serialize(optimizer))
    assert_type(again, Optimizer)
    copied = type(optimizer).from_config(optimizer.get_config())
    copied.build(variables)
    copied.set_weights(optimizer.get_weights())

adam = fused_kopt.Adam()
assert_type(fused_kopt.Adam.from_config(adam.get_config()), fused_kopt.Adam)
adam.learning_rate = 0.5
adam.lr = schedules.CosineDecay(0.1, 100)
adam.clipnorm, adam.executor = 1.0, "reference"
adam.scale_learning_rate(model.parameters(), 0.5)
loss().backward()  # type: ignore[no-untyped-call]  # torch's own
pairs = [(variable.grad, variable) for variable in variables]
report = fused_kopt.verify(adam, pairs, executor="reference")
assert_type(report.equal, bool)
assert_type(adam.describe(pairs).launches, int)
flat = adam.flatten(variables)
flat.zero_grad()
loss().backward()  # type: ignore[no-untyped-call]  # torch's own
adam.apply_gradients(flat)
flat.restore()
assert_type(fused_kopt.stats().launches, int)
try:
    adam.apply_gradients([(torch.ones(9), variables[0])])
except (ValueError, errors.StaleVariableError, fused_kopt.TornStepError, fused_kopt.FusedMismatchError) as error:
    print(error)


def wrong() -> None:
    """Never called: mistakes that a type checker finds."""
    fused_kopt.Adam(momentum=0.9)  # wrong: call-arg
    fused_kopt.SGD(executor="gpu")  # wrong: arg-type
    fused_kopt.SGD(clipnorm="1")  # wrong: arg-type
    adam.apply_gradients(3)  # wrong: arg-type
    adam.apply_gradients([variables[0]])  # wrong: list-item
    adam.executor = "gpu"  # wrong: assignment
    adam.scale_learning_rate(variables, "1")  # wrong: arg-type
    optimizers.get(3)  # wrong: arg-type
    text: str = adam.describe()  # wrong: assignment
    print(text, fused_kopt.AdamX)  # wrong: attr-defined
