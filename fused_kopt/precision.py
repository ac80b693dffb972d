"""Precision policies: how variables, their masters and their slots are stored, and how values are rounded there."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fused_kopt import codecs, layout, options
from fused_kopt.execute import Rule
from fused_kopt.op import GROUP
from fused_kopt.slots import POSITION, Slot, SlotGroups

Master = Literal["none", "float32", "int16", "int8", "kahan"]
Stored = Literal["float32", "bfloat16", "float16", "float8_e4m3", "float8_e5m2", "block8"]
Rounding = Literal["nearest", "stochastic"]

MASTERS: dict[str, tuple[Rule, str, torch.dtype]] = {
    "float32": (codecs.master_float32, "master", torch.float32),
    "int16": (codecs.master_int16, "remainder", torch.int16),
    "int8": (codecs.master_int8, "remainder", torch.int8),
    "kahan": (codecs.master_kahan, "compensation", torch.bfloat16),
}
KEPT = tuple(name for _, name, _ in MASTERS.values())  # what a master's planes are called
WHOLE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of each 8-bit format: the codecs of any slot and of those that are never negative, the code of a group's largest element in each,
# and what it stands for.
EIGHT: dict[str, tuple[tuple[Rule, Rule], tuple[int, int], float]] = {
    "float8_e4m3": ((codecs.float8_e4m3, codecs.float8_e4m3), (126, 126), 448.0),
    "float8_e5m2": ((codecs.float8_e5m2, codecs.float8_e5m2), (123, 123), 57344.0),
    "block8": ((codecs.block, codecs.block_positive), (127, 255), 1.0),
}
# A centered RMSprop's mean and mean square, as Keras and torch call them.
CENTERED = (("mg", "rms"), ("grad_avg", "square_avg"))


@dataclass(frozen=True)
class Precision:
    """How a variable's state is stored. The rule computes in float32 in any case; `float32` changes nothing.

    Attributes:
        master: of a bfloat16 variable, what is kept besides it. "none"; "float32": a copy (4 bytes); "int16": the lower half of
            the float32's bits, so that nothing is lost (2 bytes); "int8": 8 of them, relative error at most 2^-16 (1 byte);
            "kahan": the rounding error as a bfloat16 (2 bytes).
        slots: "float32"; "bfloat16", "float16"; "float8_e4m3", "float8_e5m2" or "block8", with one float32 scale for 64 elements.
            Or pairs of (slot name, format); slots not named are float32. float64 variables keep float64 slots.
        rounding: "nearest", or "stochastic" for a variable without master and for slots of fewer than 32 bits.
        seed: of stochastic rounding, in [0, 2^32). The same seed gives the same bits on every executor.

    Raises ValueError for unknown names and for combinations without meaning.
    """

    master: Master = "none"
    slots: Stored | tuple[tuple[str, Stored], ...] = "float32"
    rounding: Rounding = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        _among("master", self.master, ("none", *MASTERS))
        _among("rounding", self.rounding, ("nearest", "stochastic"))
        formats = [self.slots] if isinstance(self.slots, str) else [stored for _, stored in self.slots]
        for stored in formats:
            _among("slots", stored, (*WHOLE, *EIGHT))
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 32:
            raise ValueError(f"`seed` must be an int in [0, 2^32). Received: seed={self.seed!r}.")
        if self.rounding == "stochastic" and self.master != "none" and set(formats) <= {"float32"}:
            raise ValueError(f"Nothing is rounded stochastically with master={self.master!r} and slots of float32. Use rounding='nearest'.")
        if self.rounding == "stochastic" and "float16" in formats:
            raise ValueError("Slots of float16 are rounded to nearest only. Use bfloat16 or 8 bits with rounding='stochastic'.")

    def format(self, slot: Slot) -> str:
        """How a slot of a 16- or 32-bit variable is stored."""
        if isinstance(self.slots, str):
            return "float32" if slot.copied else self.slots
        return dict(self.slots).get(slot.name, "float32")

    def check(self, dtype: torch.dtype, slots: Sequence[Slot], what: str) -> None:
        """Raises ValueError where the policy has no meaning for a variable of `dtype` with these slots. what: the variable's name."""
        if self == DEFAULT:
            return
        if dtype != torch.bfloat16 and (self.master != "none" or (dtype == torch.float64 and self.slots != "float32")):
            need = "a bfloat16 variable" if self.master != "none" else "float32 slots for float64 variables"
            raise ValueError(
                f"{what} is {dtype}, but {self} needs {need}. Give it precision='float32': by set_precision([v], 'float32'), "
                "or as a parameter group of its own."
            )
        names = {slot.name for slot in slots}
        unknown = [] if isinstance(self.slots, str) else [name for name, _ in self.slots if name not in names]
        if unknown:
            raise ValueError(f"{self} names slots that this optimizer lacks: {unknown}. It has {sorted(names)}.")
        rough = [slot.name for slot in slots if self.format(slot) != "float32"]
        for mean, square in CENTERED:
            if mean in names and {mean, square} & set(rough):
                what = f"{square} - {mean}^2 of a centered RMSprop would turn negative"
                raise ValueError(f"{self} stores {rough} in few bits; {what}. Use float32 for both.")

    @property
    def random(self) -> bool:
        """Whether a step needs random bits."""
        return self.rounding == "stochastic"

    def packs(self, dtype: torch.dtype, slots: Sequence[Slot]) -> bool:
        """Whether a variable's state is anything but variable and slots in whole numbers, rounded to nearest."""
        if dtype == torch.float64:
            return False
        rough = [self.format(slot) for slot in slots]
        return self.master != "none" or any(f in EIGHT for f in rough) or (self.random and (dtype != torch.float32 or "bfloat16" in rough))

    def groups(self, dtype: torch.dtype, groups: SlotGroups) -> SlotGroups:
        """The parts in which a variable's slots are stored, for `weights`: in the place of each slot, and the master's last."""
        if self == DEFAULT or dtype == torch.float64:
            return groups
        parts = tuple(tuple(part for slot in group for part in self._parts(slot)) for group in groups)
        master = MASTERS.get(self.master)
        return (*parts, (Slot(master[1], stored=master[2]),)) if master else parts

    def _parts(self, slot: Slot) -> list[Slot]:
        stored = self.format(slot)
        if stored in WHOLE:
            return [slot._replace(stored=WHOLE[stored])]
        _, codes, top = EIGHT[stored]
        code = codes[slot.positive] if slot.initial else 0
        return [Slot(slot.name, code, stored=torch.uint8), Slot(f"{slot.name}_scale", slot.initial / top, group=GROUP)]

    def rule(self, dtype: torch.dtype, slots: Sequence[Slot], rule: Rule) -> Rule:
        """The rule on what is stored, as `planes` lists it."""
        if not self.packs(dtype, slots):
            return rule
        rounding = codecs.noise if self.random else codecs.half
        whole = options.around(codecs.bare, rule)
        codec_of = [self._codec(slot) for slot in slots]
        if any(codec is not codecs.plain for codec in codec_of):
            for codec in reversed(codec_of):
                whole = options.around(codec, whole, rounding)
        if self.master != "none":
            return options.around(MASTERS[self.master][0], whole)
        return options.around(codecs.stochastic, whole) if self.random and dtype == torch.bfloat16 else whole

    def _codec(self, slot: Slot) -> Rule:
        stored = self.format(slot)
        if stored in EIGHT:
            return EIGHT[stored][0][slot.positive]
        return codecs.bfloat16 if stored == "bfloat16" and self.random else codecs.plain

    def planes(self, dtype: torch.dtype, groups: SlotGroups) -> tuple[Slot, ...]:
        """What a launch reads and writes besides the variable, in the order in which `rule` takes it."""
        parts = tuple(part for group in self.groups(dtype, groups) for part in group)
        packed = self.packs(dtype, [slot for group in groups for slot in group])
        return (POSITION, *parts) if packed else parts

    def read(self, groups: SlotGroups, variable: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What a variable and its slots stand for: float32 (float64) tensors in its shape, the variable's master first.

        parts: by the names that `groups` of the policy gives.
        """
        slots = [slot for group in groups for slot in group]
        if not self.packs(variable.dtype, slots):
            return variable.detach(), {slot.name: parts[slot.name].to(layout.compute_dtype(variable.dtype)) for slot in slots}
        planes = [layout.memory_order(parts[plane.name]) for plane in self.planes(variable.dtype, groups) if plane.group]
        values = [t.float() if t.is_floating_point() else t.to(torch.int32) for t in (layout.memory_order(variable.detach()), *planes)]
        found = _Seen(values[0].new_zeros(()))
        position = torch.zeros_like(values[0], dtype=torch.int32)
        self.rule(variable.dtype, slots, _see)(values[0], values[0], (position, *values[1:]), found)
        p, *rest = (layout.shaped(value, variable) for value in found.values)
        return p, dict(zip((slot.name for slot in slots), rest, strict=True))

    def extended(self, scalars: Any, step: int) -> Any:
        """A step's scalars, with its key where the policy needs random bits. step: how many came before."""
        if not self.random:
            return scalars
        kind: Any = type(scalars)
        return options.extended(kind, "key_low", "key_high")(*scalars, *self.key(step))

    def key(self, step: int) -> tuple[float, float]:
        """The two halves of a step's key for `codecs.noise`."""
        x = (self.seed * 0x9E3779B1 + (step + 1) * 0x85EBCA77) & 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
        return float(x & 0xFFFF), float(x >> 16)


class _Seen:
    """In the place of a step's scalars, what takes down what a rule is given."""

    def __init__(self, zero: Tensor) -> None:
        self.key_low = self.key_high = zero
        self.values: tuple[Tensor, ...] = ()


def _see(p: Any, g: Any, slots: Any, s: Any) -> Any:
    s.values = (p, *slots)
    return p, slots


def _among(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}. Received: {name}={value!r}.")


DEFAULT = Precision()
NAMED: Mapping[str, Precision] = {
    "float32": DEFAULT,
    "bf16_master": Precision(master="float32"),
    "bf16_split": Precision(master="int16"),
    "bf16_kahan": Precision(master="kahan", slots="bfloat16"),
    "bf16_stochastic": Precision(slots="bfloat16", rounding="stochastic"),
    "bf16_8bit": Precision(master="int8", slots="block8", rounding="stochastic"),
}


def serialize(policy: Precision) -> Any:
    """What `get` turns back into the policy: its name, or its attributes, as JSON has them."""
    return next((name for name, known in NAMED.items() if known == policy), None) or asdict(policy)


def get(given: "str | Precision | Mapping[str, Any]") -> Precision:
    """A policy by name, by its attributes, or itself. ValueError for unknown names, TypeError for anything else."""
    if isinstance(given, Precision):
        return given
    if isinstance(given, Mapping):
        slots = given.get("slots", DEFAULT.slots)
        return Precision(**{**given, "slots": slots if isinstance(slots, str) else tuple((name, stored) for name, stored in slots)})
    if not isinstance(given, str):
        raise TypeError(f"`precision` must be a name or a Precision. Received: {type(given).__name__}.")
    _among("precision", given, tuple(NAMED))
    return NAMED[given]


def title(policy: Precision) -> str:
    """A policy's name; what it consists of where it has none."""
    return next((name for name, named in NAMED.items() if named == policy), repr(policy))
