"""What a launch does to a gradient before the rule: rule text, run by every executor."""

from fused_kopt import op

# grad_scale, bound, multiplier, divisor, scale: the numbers that change nothing.
NEUTRAL_FACTORS = (1.0, float("inf"), 1.0, 1.0, 1.0)


def keep(g, f):
    """The gradient as it is."""
    return g


def scale(g, f):
    """What is measured: the gradient without the loss scale, before it is clipped."""
    return g * f[0]


def scale_and_bound(g, f):
    """What comes before a norm: loss scale and clipvalue."""
    return op.clip(g * f[0], f[1])


def scale_and_clip(g, f):
    """Loss scale, clipvalue, clipnorm, global_clipnorm, in Keras's order and rounding."""
    return op.div(scale_and_bound(g, f) * f[2], f[3]) * f[4]
