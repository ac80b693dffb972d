"""Wrong versions of the source, one edit each: what the tests must notice. `tests/mutants.py` runs them."""

from collections.abc import Iterator
from typing import NamedTuple


class Mutation(NamedTuple):
    """One edit: `old`, which occurs exactly once in the function or class `where` (or the file, if empty), becomes `new`."""

    name: str
    tests: str  # runs of pytest (arguments; arguments) that are likely to notice; the rest of the suite follows
    file: str
    where: str
    old: str
    new: str


def group(tests: str, file: str, *edits: tuple[str, str, str, str]) -> Iterator[Mutation]:
    return (Mutation(name, tests, file, where, old, new) for name, where, old, new in edits)


def golden(names: str) -> str:
    return f"test_golden.py -k 'reference and ({names})'"


EXECUTORS = "test_executors.py"
EXECUTION = "test_reliability_d.py test_reliability_d2.py test_reliability_d3.py"
OPTIMIZERS = "fused_kopt/optimizers/"

# The mutants of reliability.md 1.8, which other projects' criteria let pass, first: 2 to 19 of 19 survive there.
ADAM = group(
    golden("adam"),
    OPTIMIZERS + "adam.py",
    ("no-op", "adam", "p - op.div(m * s.alpha, op.sqrt(v) + s.epsilon), (m, v)", "p, (m, v)"),
    ("gradient sign flipped", "adam", "(g - m)", "(-g - m)"),
    ("beta_2 .99", "__init__", "beta_2: Any = 0.999", "beta_2: Any = 0.99"),
    ("epsilon inside the root", "adam", "op.sqrt(v) + s.epsilon", "op.sqrt(v + s.epsilon)"),
    ("textbook epsilon", "derive", "step.exact(epsilon)", "step.exact(epsilon) * root"),
    ("learning rate +1 %", "derive", "(rate * root / correction,", "(rate * step.dtype(1.01) * root / correction,"),
    ("learning rate +0.01 %", "derive", "(rate * root / correction,", "(rate * step.dtype(1.0001) * root / correction,"),
    ("v biased +0.1 %", "derive", "1 - beta_2, step", "(1 - beta_2) * step.dtype(1.001), step"),
    ("m and v swapped", "adam", "s.epsilon), (m, v)", "s.epsilon), (v, m)"),
    ("no bias correction", "derive", "(rate * root / correction,", "(rate,"),
    ("no correction of v", "derive", "(rate * root / correction,", "(rate / correction,"),
    ("v of the gradient, not its square", "adam", "(g * g - v)", "(op.abs(g) - v)"),
    ("step with the old m", "adam", "op.div(m * s.alpha", "op.div(slots[0] * s.alpha"),
    ("m rounded as in the sparse rule", "adam", "m + (g - m) * s.one_minus_beta_1", "m * s.beta_1 + g * s.one_minus_beta_1"),
    ("alpha after the quotient", "adam", "op.div(m * s.alpha, op.sqrt(v) + s.epsilon)", "op.div(m, op.sqrt(v) + s.epsilon) * s.alpha"),
    ("alpha's quotient first", "derive", "(rate * root / correction,", "(rate * (root / correction),"),
    ("1 - beta_2 of the decimal", "derive", "1 - beta_2, step", "step.exact(1 - round(float(beta_2), 6)), step"),
    ("vhat forgets", "amsgrad", "op.maximum(vhat, v)", "v"),
    ("vhat unused", "amsgrad", "op.sqrt(vhat)", "op.sqrt(v)"),
    ("sparse alpha as dense", "derive", "rate * (root / correction)", "rate * root / correction"),
    ("sparse Adam moves touched rows only", "Adam", 'sparse_rows = "all"', 'sparse_rows = "touched"'),
)
SGD = group(
    golden("sgd"),
    OPTIMIZERS + "sgd.py",
    ("velocity's sign", "momentum", "s.momentum - g", "s.momentum + g"),
    ("rate outside the velocity", "momentum", "s.momentum - g * s.learning_rate", "s.momentum - g"),
    ("no Nesterov term", "nesterov", "p + (velocity * s.momentum - g * s.learning_rate)", "p + velocity"),
    ("Nesterov with the old velocity", "nesterov", "p + (velocity *", "p + (slots[0] *"),
    ("SGD never has momentum 1", "__init__", "or momentum > 0", "or 0 < momentum < 1"),
    ("repeated rows summed first", "SGD", '"touched" if self._has_momentum else "each"', '"touched"'),
)
RMSPROP = group(
    golden("rmsprop"),
    OPTIMIZERS + "rmsprop.py",
    ("RMSprop epsilon inside", "rmsprop", "op.sqrt(rms) + s.epsilon", "op.sqrt(rms + s.epsilon)"),
    ("momentum epsilon outside", "with_momentum", "op.sqrt(rms + s.epsilon)", "op.sqrt(rms) + s.epsilon"),
    ("mean not squared", "centered", "rms - mean * mean", "rms - mean"),
    ("old velocity applied", "with_momentum", "p - velocity", "p - slots[1]"),
    ("rms of both rounded otherwise", "centered_with_momentum", "rms + (g * g - rms) *", "rms * s.rho + g * g *"),
    ("sparse order of epsilon", "sparse_centered_with_momentum", "rms + s.epsilon - mean * mean", "rms - mean * mean + s.epsilon"),
)
WEIGHTS = "test_weights.py test_state.py"
OTHERS = (
    *group(WEIGHTS, OPTIMIZERS + "adam.py", ("V1 vhats kept", "_compatible", "weights[: len(self.weights)] if", "weights if")),
    *group(WEIGHTS, OPTIMIZERS + "rmsprop.py", ("RMSprop slot names", "slot_groups", "for name in names", "for name in sorted(names)")),
    *group(
        golden("adadelta"),
        OPTIMIZERS + "adadelta.py",
        ("Adadelta uses the new updates", "adadelta", "op.sqrt(updates + s.epsilon)", "op.sqrt(updates * s.rho + s.epsilon)"),
        ("rate inside the accumulator", "adadelta", "update * update * s.one", "update * update * s.learning_rate * s.one"),
        ("Adadelta divides directly", "adadelta", "s.one, op.sqrt(gradients + s.epsilon)) * g", "g, op.sqrt(gradients + s.epsilon))"),
    ),
    *group(
        golden("adagrad"),
        OPTIMIZERS + "adagrad.py",
        ("Adagrad uses the old accumulator", "adagrad", "op.sqrt(accumulator)", "op.sqrt(slots[0])"),
        ("Adagrad epsilon inside", "adagrad", "op.sqrt(accumulator) + s.epsilon", "op.sqrt(accumulator + s.epsilon)"),
        ("accumulator starts at 0", "slot_groups", ", self._initial_accumulator_value", ""),
    ),
    *group(
        golden("adamax"),
        OPTIMIZERS + "adamax.py",
        ("norm without magnitude", "adamax", "op.abs(g)", "g"),
        ("Adamax without correction", "derive", " / (1 - step.power(beta_1, step.t))", ""),
        ("Adamax rate in the numerator", "adamax", "op.div(m, v + s.epsilon) * s.alpha", "op.div(m * s.alpha, v + s.epsilon)"),
    ),
    *group(
        golden("nadam"),
        OPTIMIZERS + "nadam.py",
        ("cache advanced twice", "scalars", "step.cache = found.cache", "step.cache = found.cache * found.now"),
        ("cache never advanced", "_commit", "self._cache.dtype in steps", "False"),
        ("momentum schedule a step late", "momenta", "for i in (0, 1)", "for i in (1, 2)"),
        ("no Nadam look-ahead", "nadam", " + op.div(m, s.one_minus_next_cache) * s.next_momentum", ""),
        ("Nadam v uncorrected", "nadam", "op.sqrt(op.div(v, s.one_minus_beta_2_power))", "op.sqrt(v)"),
    ),
    *group(
        golden("ftrl"),
        OPTIMIZERS + "ftrl.py",
        ("shrinkage enters n", "ftrl_shrunk", "_half(p, g,", "_half(p, g + p * s.two_l2_shrinkage,"),
        ("sigma's sign", "_half", "root - op.sqrt(slots[0])", "op.sqrt(slots[0]) - root"),
        ("old root rebuilds", "_half", "return n, root,", "return n, op.sqrt(slots[0]),"),
        ("l1 not strict", "_rebuild", "op.abs(z) > s.l1", "op.abs(z) > s.l1 * s.l1"),
        ("l1's sign", "_rebuild", "op.sign(z) * s.l1 - z", "op.sign(z) * s.l1 + z"),
        ("beta not halved", "derive", "/ (2 * rate)", "/ rate"),
        ("l2 once", "derive", "l1), 2 * l2,", "l1), l2,"),
        ("power's sign", "derive", "-step.number(power)", "step.number(power)"),
        ("slots in separate groups", "slot_groups", '), Slot("linear"))', '),), (Slot("linear"),)'),
        ("vectors as matrices", "sparse_rule", "rank == 1", "False"),
    ),
    *group(
        EXECUTORS,
        OPTIMIZERS + "lion.py",
        ("Lion steps with the new m", "lion", "m * s.beta_1 + g * s.one_minus_beta_1)", "m * s.beta_2 + g * s.one_minus_beta_2)"),
        ("Lion keeps the interpolation", "lion", "(m * s.beta_2 + g * s.one_minus_beta_2,)", "(m * s.beta_1 + g * s.one_minus_beta_1,)"),
        ("Lion without sign", "lion", "op.sign(", "("),
    ),
)

RULES = (*ADAM, *SGD, *RMSPROP, *OTHERS)
