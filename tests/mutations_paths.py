"""Wrong versions of what repeats, flattens and clips steps, and of the C++ executor, one edit each (see `mutations.py`)."""

from mutations import group

PATHS = (
    *group(
        "test_clipping.py",
        "fused_kopt/norms.py",
        ("norms in float32", "square_norm", "values.double().square()", "values.square().double()"),
    ),
)
