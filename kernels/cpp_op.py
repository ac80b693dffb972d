"""The C++ twin of `fused_kopt.op`: the same names in the same order. Calling a rule on `Value`s writes its C++.

`C` is the compute type. Correct rounding is the compiler's: IEEE square root and division, and no contraction to fma.
"""

from typing import Any


class Value:
    """A C++ expression. Every operation on it appends one statement to `body` and is named by it."""

    def __init__(self, text: str, body: list[str]) -> None:
        self.text = text
        self.body = body

    def new(self, expression: str, kind: str = "C") -> "Value":
        """The value of a new statement."""
        name = f"t{len(self.body)}"
        self.body.append(f"const {kind} {name} = {expression};")
        return Value(name, self.body)

    def __add__(self, other: Any) -> "Value":
        return self.new(f"{self.text} + {text(other)}")

    def __radd__(self, other: Any) -> "Value":
        return self.new(f"{text(other)} + {self.text}")

    def __sub__(self, other: Any) -> "Value":
        return self.new(f"{self.text} - {text(other)}")

    def __rsub__(self, other: Any) -> "Value":
        return self.new(f"{text(other)} - {self.text}")

    def __mul__(self, other: Any) -> "Value":
        return self.new(f"{self.text} * {text(other)}")

    def __rmul__(self, other: Any) -> "Value":
        return self.new(f"{text(other)} * {self.text}")

    def __neg__(self) -> "Value":
        return self.new(f"-{self.text}")

    def __gt__(self, other: Any) -> "Value":
        return self.new(f"{self.text} > {text(other)}", "bool")

    def __ge__(self, other: Any) -> "Value":
        return self.new(f"{self.text} >= {text(other)}", "bool")

    def __lt__(self, other: Any) -> "Value":
        return self.new(f"{self.text} < {text(other)}", "bool")

    def __le__(self, other: Any) -> "Value":
        return self.new(f"{self.text} <= {text(other)}", "bool")

    def __eq__(self, other: object) -> "Value":  # type: ignore[override]
        return self.new(f"{self.text} == {text(other)}", "bool")

    def __ne__(self, other: object) -> "Value":  # type: ignore[override]
        return self.new(f"{self.text} != {text(other)}", "bool")

    __hash__ = None

    def __bool__(self) -> bool:
        raise TypeError(f"A rule is branch-free: no `if`, `and`, `or` on {self.text!r}. Use op.where.")


def text(value: Any) -> str:
    """A value's C++ text; numbers in the compute type."""
    return value.text if isinstance(value, Value) else f"C({float(value)!r})"


def abs(x: Value) -> Value:
    return x.new(f"std::fabs({x.text})")


def clip(x: Value, bound: Value) -> Value:
    x = maximum(x, -bound)
    smaller = x.new(f"{x.text} < {bound.text} ? {x.text} : {bound.text}")
    return x.new(f"{x.text} != {x.text} ? {x.text} : {smaller.text}")


def div(x: Value, y: Value) -> Value:
    return x.new(f"{x.text} / {y.text}")


def maximum(x: Value, y: Value) -> Value:
    larger = x.new(f"{x.text} > {y.text} ? {x.text} : {y.text}")  # two selects: GCC 12 does not vectorise `||`
    return x.new(f"{x.text} != {x.text} ? {x.text} : {larger.text}")


def sign(x: Value) -> Value:
    return x.new(f"{x.text} > 0 ? C(1) : {x.text} < 0 ? C(-1) : {x.text} == 0 ? C(0) : {x.text}")


def sqrt(x: Value) -> Value:
    return x.new(f"std::sqrt({x.text})")


def where(condition: Value, x: Value, y: Any) -> Value:
    return x.new(f"{condition.text} ? {x.text} : {text(y)}")


def pow(x: Value, y: Value) -> Value:
    return x.new(f"C(std::pow(double({x.text}), double({y.text})))")
