"""Wrong versions of measured steps, one edit each (see `mutations.py`)."""

from mutations import group

LAUNCH, STEP, HOSTS = "test_stats_launch.py -k 'not machine'", "test_stats.py", "test_stats_hosts.py"
STATS = (
    *group(
        LAUNCH,
        "kernels/update.py",
        ("masked lanes are summed", "store_squares", "if mask is not None:", "if False:"),
        ("every program in the first row of sums", "store_squares", "sums + 3 * tl.program_id(0).to(tl.int64)", "sums"),
        ("the step before it is rounded", "update_block", "after - p.to(tl.float64)", "new.to(tl.float64) - p.to(tl.float64)"),
        ("the gradient after clipping", "update_block", "MEASURED(g, factors)", "PREPARE(g, factors)"),
    ),
    *group(
        LAUNCH,
        "kernels/cpp.py",
        ("C++ measures what is not stored", "_sum_squares", "Codec<V>::decode(Codec<V>::encode({cpp_op.text(new)}))", "{cpp_op.text(new)}"),
        ("C++ sums in float", "_sum_squares", '"const double x0', '"const C x0'),
        ("C++ sums every block into the first", "", '"ROW": ", sums + 3 * i"', '"ROW": ", sums"'),
    ),
    *group(
        LAUNCH,
        "fused_kopt/execute.py",
        ("the loss scale is not taken out", "bind", "(prepare.scale_and_clip, prepare.scale)", "(prepare.scale_and_clip, prepare.keep)"),
    ),
    *group(
        LAUNCH,
        "fused_kopt/reference.py",
        ("the reference steps from the new variable", "run", "variable.clone()", "variable"),
        ("sums replaced, not added", "run", "update.sums += squares", "update.sums[:] = squares"),
    ),
    *group(
        LAUNCH,
        "fused_kopt/verification.py",
        ("measured kernels are not proven", "_known_answer", "if measured else None", "if False else None"),
        ("sums may be off by 1e-6", "", "SUMS_BOUND = 1e-12", "SUMS_BOUND = 1e-6"),
    ),
    *group(
        STEP,
        "fused_kopt/engine.py",
        ("a Flat's gaps are measured", "_known", " and sums is None", ""),
        ("captured steps are measured", "_measuring", "None if self._replays is not None else ", ""),
        ("the step counted before is told", "_measuring", "self._state.steps_taken() + 1", "self._state.steps_taken()"),
    ),
    *group(
        STEP,
        "fused_kopt/repeat.py",
        ("repeated steps are not measured", "run", "if sums is not None:", "if False:"),
        ("repeated steps measure unproven kernels", "applies", "if sums is None or not same:", "if True:"),
        ("every repeated step is measured", "__init__", ", sums=None) for", ") for"),
    ),
    *group(
        STEP,
        "fused_kopt/updates.py",
        ("all rows of a sparse variable count", "measure", "if self.all_rows", "if True"),
        ("rows measured after the launch", "measure", "before = variable[rows].clone()", "before = variable[rows]"),
        ("sparse gradients with their loss scale", "measure", "if factors is not None:", "if False:"),
        (
            "rows that come twice count twice",
            "measure",
            "torch.unique(self.entry.gradient._indices()[0])",
            "self.entry.gradient._indices()[0]",
        ),
    ),
    *group(
        STEP,
        "fused_kopt/recording.py",
        ("numbers read before they arrive", "_read", "event.synchronize()", "pass"),
        ("squares for norms", "last", "math.sqrt(sum(squares))", "sum(squares)"),
    ),
    *group(STEP, "fused_kopt/hyperparameters.py", ("no rate kept", "learning_rate", "self.rate = rate if", "self.t and rate if")),
    *group(
        "test_forks.py", "kernels/cpp_launch.py", ("a child waits for its parent's threads", "_call", "os.getpid() != _process", "False")
    ),
    *group(
        HOSTS,
        "fused_kopt/torch_optim/optimizer.py",
        ("skipped steps are not counted", "step", "self._recorder.skipped += 1", "pass"),
        ("torch_optim is off by one", "_number", ".max()) + 1", ".max())"),
    ),
    *group(
        HOSTS,
        "fused_kopt/keras/logger.py",
        ("written twice", "_write", ' or stats["iterations"] == self._written', ""),
        ("no header", "_write", "table.writeheader()", "pass"),
        ("checked when it is too late", "on_train_begin", "self._stats()", "pass"),
    ),
    *group(
        HOSTS,
        "fused_kopt/lightning.py",
        ("every batch of an accumulated step", "on_train_batch_end", "step == self._seen or ", ""),
        ("every step", "on_train_batch_end", " or step % every", ""),
    ),
)
