"""Wrong versions of loss scaling and of gradient buffers."""

from mutations import group

TESTS = "test_loss_scale.py test_loss_scale_host.py"

SCALE = (
    *group(
        TESTS,
        "fused_kopt/loss_scale.py",
        ("grows a step late", "update", "self.counter + 1 >= self.growth_steps", "self.counter >= self.growth_steps"),
        ("grows without end", "update", "full & (doubled < torch.inf)", "full"),
        ("no floor", "update", ".clamp_min_(1)", ""),
        ("floor for finite steps too", "update", "doubled, self.scale)", "doubled, self.scale.clamp(min=1))"),
        ("counter never reset by growth", "update", "(finite & ~full)", "finite"),
        ("skips not counted", "update", "self.skipped.add_(~finite)", "pass"),
        ("infinity is finite", "check", "total - total", "torch.where(total.isnan(), total, 0.0)"),
        ("a skipped step measured", "spoil", ".add_(self._rest)", ""),
        ("the scale stays at home", "unscaled", "self.unscale, None", "self.unscale, self.unscale"),
    ),
    *group(
        TESTS,
        "fused_kopt/clipping.py",
        ("bounded gradients are finite", "measure", "clips._replace(clipvalue=None)", "clips"),
        ("a pass of its own always", "measure", "seen is None or clips != free", "True"),
        ("a table scaled for ever", "_unscaled", "table = table.clone()", "pass"),
    ),
    *group(
        TESTS,
        "fused_kopt/engine.py",
        ("Nadam's cache goes on", "_finish", "not self.carries or ", "True or "),
        ("the scale stands still", "_finish", "guard.commit()", "pass"),
        ("an empty list leaves the scale", "_apply_pairs", "self._guard is not None and self._guard.open", "False"),
        ("transformers see scaled gradients", "_unscaled", "self._guard.unscaled([g for g, _ in pairs])", "[g for g, _ in pairs]"),
    ),
    *group(TESTS, "fused_kopt/planned.py", ("no gate on first steps", "_rounds", "None if self._guard is None else", "None if True else")),
    *group(TESTS, "fused_kopt/repeat.py", ("no gate on later steps", "clip", "None if guard is None else", "None if True else")),
    *group(TESTS, "fused_kopt/reference.py", ("the reference takes every step", "run", "not update.gate", "False")),
    *group(TESTS, "kernels/cpp_launch.py", ("C++ takes every step", "bind", "not update.gate", "False")),
    *group(TESTS, "kernels/launch.py", ("gradients absent, not variables", "gated", "table[:, 2] *= gate", "table[:, 1] *= gate")),
    *group(TESTS, "fused_kopt/updates.py", ("a skipped sparse step adds 0", "_each", "full_like(values, -0.0)", "zeros_like(values)")),
    *group(
        TESTS,
        "fused_kopt/mixed_precision.py",
        ("autograd keeps the live scale", "_times_scale", ", copy=True", ""),
        ("a guard left behind", "_guarded", "self._inner._guard = None", "pass"),
        ("copies cannot be wrapped", "__setstate__", 'self._adopt(values["_inner"]', 'self._adopt(self.__dict__["_inner"]'),
    ),
    *group("test_apply.py", "fused_kopt/declared.py", ("iterations before the step", "_scalars", "steps_taken()", "steps_taken() + 1")),
    *group(
        "test_loss_scale_checkpoint.py",
        "fused_kopt/checkpoint/scaling.py",
        ("any scale restored", "taken", "0 < scale < math.inf and", ""),
        ("no counter in files", "live", ', "dynamic_counter": state.counter', ""),
    ),
    *group(
        "test_accumulation.py",
        "fused_kopt/accumulation.py",
        ("weights ignored", "added", "g * s.weight", "g"),
        ("absent gradients are zeros", "__iter__", "(b if filled else None, v)", "(b, v)"),
        ("gradients kept", "add", "variable.grad = None", "pass"),
    ),
)
