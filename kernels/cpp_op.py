"""The C++ twin of `fused_kopt.op`: the same names in the same order. Calling a rule on `Value`s writes its C++.

`C` is the compute type. Correct rounding is the compiler's: IEEE square root and division, and no contraction to fma.
"""

from typing import Any


class Value:
    """A C++ expression. Every operation on it appends one statement to `body` and is named by it.

    kind: its type: the compute type `C`, "int32_t" or "bool". grouped: whether it is one value for a group of elements; the
    statements of such begin with @.
    """

    def __init__(self, text: str, body: list[str], kind: str = "C", grouped: bool = False) -> None:
        self.text, self.body, self.kind, self.grouped = text, body, kind, grouped

    def new(self, expression: str, kind: str = "C", grouped: bool | None = None) -> "Value":
        """The value of a new statement; grouped as this one is, if nothing else is said."""
        name, grouped = f"t{len(self.body)}", self.grouped if grouped is None else grouped
        self.body.append(f"{'@' if grouped else ''}const {kind} {name} = {expression};")
        return Value(name, self.body, kind, grouped)

    def _with(self, left: Any, sign: str, right: Any, kind: str = "") -> "Value":
        """Of numbers in the compute type, or of integers, which wrap as unsigned ones do."""
        grouped = all(side.grouped for side in (left, right) if isinstance(side, Value))
        first, second = (text(side, self.kind) for side in (left, right))
        if self.kind == "int32_t" and not kind:
            cast = "uint32_t" if sign != ">>" else ""
            return self.new(f"int32_t({cast}({first}) {sign} {cast}({second}))", "int32_t", grouped)
        return self.new(f"{first} {sign} {second}", kind or "C", grouped)

    def __add__(self, other: Any) -> "Value":
        return self._with(self, "+", other)

    def __radd__(self, other: Any) -> "Value":
        return self._with(other, "+", self)

    def __sub__(self, other: Any) -> "Value":
        return self._with(self, "-", other)

    def __rsub__(self, other: Any) -> "Value":
        return self._with(other, "-", self)

    def __mul__(self, other: Any) -> "Value":
        return self._with(self, "*", other)

    def __rmul__(self, other: Any) -> "Value":
        return self._with(other, "*", self)

    def __and__(self, other: Any) -> "Value":
        return self._with(self, "&", other)

    def __or__(self, other: Any) -> "Value":
        return self._with(self, "|", other)

    def __xor__(self, other: Any) -> "Value":
        return self._with(self, "^", other)

    def __lshift__(self, other: int) -> "Value":
        return self._with(self, "<<", other)

    def __rshift__(self, other: int) -> "Value":
        return self._with(self, ">>", other)

    def __neg__(self) -> "Value":
        return self.new(f"-{self.text}")

    def __gt__(self, other: Any) -> "Value":
        return self._with(self, ">", other, "bool")

    def __ge__(self, other: Any) -> "Value":
        return self._with(self, ">=", other, "bool")

    def __lt__(self, other: Any) -> "Value":
        return self._with(self, "<", other, "bool")

    def __le__(self, other: Any) -> "Value":
        return self._with(self, "<=", other, "bool")

    def __eq__(self, other: object) -> "Value":  # type: ignore[override]
        return self._with(self, "==", other, "bool")

    def __ne__(self, other: object) -> "Value":  # type: ignore[override]
        return self._with(self, "!=", other, "bool")

    __hash__ = None

    def __bool__(self) -> bool:
        raise TypeError(f"A rule is branch-free: no `if`, `and`, `or` on {self.text!r}. Use op.where.")


def text(value: Any, kind: str = "C") -> str:
    """A value's C++ text; numbers in the compute type, or whole ones where `kind` is int32_t."""
    if isinstance(value, Value):
        return value.text
    return f"int32_t({value})" if kind == "int32_t" else f"C({float(value)!r})"


def abs(x: Value) -> Value:
    return x.new(f"std::fabs({x.text})")


def clip(x: Value, bound: Value) -> Value:
    x = maximum(x, -bound)
    smaller = x.new(f"{x.text} < {bound.text} ? {x.text} : {bound.text}")
    return x.new(f"{x.text} != {x.text} ? {x.text} : {smaller.text}")


def div(x: Value, y: Value) -> Value:
    return x._with(x, "/", y)


def maximum(x: Value, y: Value) -> Value:
    larger = x.new(f"{x.text} > {y.text} ? {x.text} : {y.text}")  # two selects: GCC 12 does not vectorise `||`
    return x.new(f"{x.text} != {x.text} ? {x.text} : {larger.text}")


def sign(x: Value) -> Value:
    return x.new(f"{x.text} > 0 ? C(1) : {x.text} < 0 ? C(-1) : {x.text} == 0 ? C(0) : {x.text}")


def sqrt(x: Value) -> Value:
    return x.new(f"std::sqrt({x.text})")


def where(condition: Value, x: Any, y: Any) -> Value:
    sides = [side for side in (x, y) if isinstance(side, Value)]
    grouped = all(side.grouped for side in (condition, *sides))
    return condition.new(f"{condition.text} ? {text(x, sides[0].kind)} : {text(y, sides[0].kind)}", sides[0].kind, grouped)


def pow(x: Value, y: Value) -> Value:
    return x.new(f"C(std::pow(double({x.text}), double({y.text})))")


GROUP = 64


def bits(x: Value) -> Value:
    return x.new(f"bits_as<int32_t>({x.text})", "int32_t")


def number(x: Value) -> Value:
    return x.new(f"bits_as<C>({x.text})")


def integer(x: Value) -> Value:
    return x.new(f"int32_t({x.text})", "int32_t")


def position(at: Value) -> Value:
    return at


def largest(x: Value, at: Value) -> Value:
    name = f"t{len(x.body)}"
    x.body.append(f"@int32_t {name} = 0;")
    x.body.append(f"@for (int64_t i = 0; i < n; ++i) {name} = {name} < {x.text} ? {x.text} : {name};")
    return Value(name, x.body, "int32_t", grouped=True)


def spread(x: Value, like: Value) -> Value:
    return Value(x.text, x.body, x.kind)
