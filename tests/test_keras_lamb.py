"""fused_kopt.keras.Lamb against Keras's own and against its formula, in a process whose Keras runs on torch."""

import json
from importlib.util import find_spec
from typing import Any

import pytest
from support import python

pytestmark = pytest.mark.skipif(find_spec("keras") is None, reason="Keras is not installed")

SETUP = """
import json, sys, keras, torch, fused_kopt, fused_kopt.keras
SHAPES = [(64,), (64, 19), (), (300, 70), (5,), (0,)]
def variables(dtype):
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    values[4].zero_()  # its trust ratio is 1
    return [keras.Variable(value, dtype=dtype, name=f"v{i}") for i, value in enumerate(values)]
def run(cls, options, dtype="float64", executor=None, steps=5):
    own, optimizer = variables(dtype), cls(2**-7, **options)
    optimizer.build(own)
    optimizer.executor = executor
    if optimizer.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["v0"])
    for step in range(steps):
        torch.manual_seed(step + 1)
        gradients = [torch.randn(shape, dtype=torch.float64).mul(0.1).to(v.value.dtype) for shape, v in zip(SHAPES, own)]
        gradients[1] *= step != 2  # nothing moves its direction but its momentum
        before = fused_kopt.stats().launches
        optimizer.apply(gradients, own)
    return [v.value.detach() for v in (*own, *optimizer.variables)], fused_kopt.stats().launches - before
"""

# options that everything is run with. float32 holds them exactly: Keras rounds others to it in a float64 step
EXACT = {"beta_1": 0.875, "beta_2": 1 - 2**-10, "epsilon": 2**-20}
# Options; the launches of the fifth step (the direction, two for norms, the way there; one more to clip, one to accumulate); and
# how far from Keras: sums in another order, and where it clips by a global norm a factor that it rounds to float32
CASES: list[tuple[dict[str, Any], int, float]] = [
    ({}, 4, 1e-13),
    ({"weight_decay": 0.125, "beta_1": 0.75, "use_ema": True, "ema_momentum": 0.875}, 4, 1e-13),
    ({"global_clipnorm": 0.5, "weight_decay": 0.25}, 5, 1e-6),
    ({"gradient_accumulation_steps": 2, "clipvalue": 0.0625}, 1, 1e-13),
]

COMPARE = """
for options, launches, tolerance in json.loads(sys.argv[1]):
    expected, _ = run(keras.optimizers.Lamb, options)
    found, launched = run(fused_kopt.keras.Lamb, options, executor="compiled")
    assert launched == launches, (options, launched)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{options}: {text}")
    for dtype in ("float32", "bfloat16", "float64"):
        first, second = (run(fused_kopt.keras.Lamb, options, dtype, name)[0] for name in ("reference", "compiled"))
        assert all(map(torch.equal, first, second)), (options, dtype)
print("done")
"""


def test_lamb_is_keras_lamb() -> None:
    cases = [({**EXACT, **options}, *rest) for options, *rest in CASES]
    assert python(SETUP + COMPARE, json.dumps(cases), KERAS_BACKEND="torch") == "done\n"


FORMULA = """
w, g = keras.Variable(torch.tensor([3.0, -4.0])), torch.tensor([0.1, -0.2])
optimizer = fused_kopt.keras.Lamb(0.1, epsilon=1e-3)
optimizer.executor = "compiled"
optimizer.apply([g], [w])
u = g / (g.abs() + 1e-3)  # after one step
torch.testing.assert_close(w.value.detach(), torch.tensor([3.0, -4.0]) - 0.1 * 5 / u.norm() * u)
described = optimizer.describe()
assert (described.launches, len(described.buckets)) == (4, 2), described
assert "one more tensor per variable" in str(described)
copy = type(optimizer).from_config(optimizer.get_config())
assert copy.get_config() == optimizer.get_config()
print("done")
"""


def test_the_formula_and_the_description() -> None:
    assert python(SETUP + FORMULA, KERAS_BACKEND="torch") == "done\n"
