"""The runs of loss scaling that are recorded, and their gradients."""

import numpy as np
from golden.draw import FOLDER

PATH = FOLDER / "scales.npz"
SIZE = 5
# Steps: "." a finite gradient, "i" one with an infinity, "n" one with NaN, "e" an empty list, "z" zeros.
# Zeros at the ceiling: TensorFlow flushes the reciprocal of a scale above 2^126 to 0, and with it the gradients; torch does not.
CASES: list[tuple[str, dict, dict, str]] = [
    ("SGD", {"momentum": 0.9}, {"initial_scale": 8, "dynamic_growth_steps": 3}, "...i...n.in......iiiiiiii...."),
    ("Adam", {"amsgrad": True}, {"initial_scale": 2.0**126, "dynamic_growth_steps": 2}, "zzzzzzzzzzizzzzz"),
    ("Nadam", {}, {"initial_scale": 1024, "dynamic_growth_steps": 2}, ".i...ni..i.."),
    ("Adam", {}, {"initial_scale": 3.3, "dynamic_growth_steps": 2}, "....iii....n.."),
    ("Ftrl", {"l1_regularization_strength": 0.01}, {"initial_scale": 0.5, "dynamic_growth_steps": 1}, "i.i..nn..."),
    ("SGD", {}, {"initial_scale": 0.25, "dynamic_growth_steps": 3}, ".....i."),
    ("RMSprop", {"momentum": 0.9, "centered": True, "epsilon": 0.001}, {"dynamic_growth_steps": 0}, "..i..e.n."),
    ("Adagrad", {}, {"dynamic_growth_steps": 3}, ".e.e.i.ee..."),
    ("Adadelta", {"learning_rate": 1.0}, {}, "..ii.."),
    ("Adamax", {"clipvalue": 0.25}, {"dynamic_growth_steps": 2}, "..i..n."),
    ("SGD", {"learning_rate": 0.1, "global_clipnorm": 0.5}, {"dynamic_growth_steps": 2}, "..i..n."),
    ("SGD", {"learning_rate": 0.1, "clipnorm": 0.5, "clipvalue": 0.25}, {"dynamic_growth_steps": 2}, "..i..n."),
    ("SGD", {"learning_rate": 0.1, "clipvalue": 0.25}, {"dynamic": False, "initial_scale": 1024}, "..i.."),
    ("Adam", {"decay": 0.01}, {"dynamic": False, "initial_scale": 3.3}, "....."),
]


def gradient(step: int, kind: str) -> np.ndarray:
    """The gradient of a step before it is scaled: eighths, so that every machine has the same bits."""
    found = (((np.arange(SIZE) * 3 + step * 7) % 11 - 5) / 8).astype(np.float32)
    if kind == "z":
        found[:] = 0
    if kind in "in":
        found[step % SIZE] = np.inf if kind == "i" else np.nan
    return found
