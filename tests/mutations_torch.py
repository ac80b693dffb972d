"""Mutations of fused_kopt.torch_optim."""

from mutations import group

STEPS, ERRORS = "test_torch_optim.py", "test_torch_optim_errors.py"
STATE, HOSTS = "test_torch_optim_state.py", "test_torch_optim_hosts.py"
PRECISION = "test_torch_optim_precision.py"
SHARDS, RANKS = "test_shards.py", "test_host_distributed.py"
FOLDER = "fused_kopt/torch_optim/"

TORCH = (
    *group(
        STEPS,
        FOLDER + "rows.py",
        ("no group decays but the first", "rules", "for group in owner.param_groups)", "for group in owner.param_groups[:1])"),
        ("all groups as the first", "of", "found[:1] if all(row == found[0] for row in found) else found", "found[:1]"),
        ("one step count for all", "__init__", "all((column == column[0]).all() for column in columns)", "True"),
    ),
    *group(
        STATE,
        FOLDER + "loading.py",
        ("momentum without the rate", "_state", "owner.momentum_sign * float(group", "owner.momentum_sign * bool(group"),
    ),
    *group(
        STATE,
        FOLDER + "stored.py",
        ("slots in the parameter's dtype", "planes", "compute = layout.compute_dtype(dtype)", "compute = dtype"),
    ),
    *group(
        PRECISION,
        FOLDER + "stored.py",
        ("roots in signed codes", "slots", "name in POSITIVE", "False"),
        ("a policy may change", "check_same", "if old != chosen and", "if False and"),
        ("scales of shards", "check", "shards.divides(param, GROUP)", "True"),
        ("masters in another order", "master", "layout.clone(t, layout.dense_stride(local)) if", "t if"),
    ),
    *group(
        PRECISION,
        FOLDER + "rows.py",
        ("one key for all steps", "of", "self._policy.extended(row, step.iterations)", "self._policy.extended(row, 0)"),
        ("decay forgotten under policies", "of", "self._row(self", "(lambda g, s: self._owner.scalars(g, s))(self"),
    ),
    *group(
        PRECISION,
        FOLDER + "loading.py",
        ("states of another policy", "kept", "!= stored.policy(own):", "is None:"),
        ("the default policy replaces a group's own", "kept", '{**group, "precision": own["precision"]}', "{**group}"),
        ("planes cast", "_slot", "value.dtype != plane.stored if packed", "False if packed"),
    ),
    *group(
        PRECISION,
        FOLDER + "members.py",
        ("one policy for all", "_part", "rules[i] == rule", "rules[i][0] is rule[0]"),
    ),
    *group(
        STATE,
        FOLDER + "members.py",
        ("replaced counters unnoticed", "of", "return all(all(map", "return True or all(all(map"),
    ),
    *group(
        STATE,
        FOLDER + "optimizer.py",
        ("the dummy step counts", "_begin", "not self.state and self._dummy(found, grads)", "False"),
        ("a warm-up from 0 does not count", "_dummy", "and not found.moves(grads)", "or not found.moves(grads)"),
    ),
    *group(
        HOSTS,
        FOLDER + "optimizer.py",
        ("infinite steps taken", "_unscaling", "None if infinite else 1.0 / scale", "1.0 / scale"),
        ("gradients stay scaled", "_unscaling", "1.0 / scale", "1.0"),
    ),
    *group(
        ERRORS,
        FOLDER + "optimizer.py",
        ("states before the check", "_make_states", "if lacking:\n", "if not lacking:\n"),
        (
            "one part before the next is looked at",
            "_job",
            "borrower.prepare(task, given))",
            "borrower.prepare(task, given)() or (lambda: None))",
        ),
    ),
    *group(
        SHARDS,
        FOLDER + "shards.py",
        ("replicas count twice", "_groups", "not p.is_replicate() and ", ""),
        ("every shard begins at 0", "start", "before += offset", "before += 0"),
        ("columns begin as rows do", "start", "math.prod(chunk.sizes[:dim])", "1"),
        ("uneven rows have scales", "divides", "param.shape[0] % parts == 0", "True"),
    ),
    *group(
        RANKS,
        FOLDER + "shards.py",
        ("squares in the order of groups", "whole", "if len(squares) > 1:", "if False:"),
        ("a kind is not added up", "total", "there[which]", "there[which] & (which > 0)"),
    ),
    *group(
        RANKS,
        FOLDER + "members.py",
        ("positions after this rank's shards", "_positions", "param.numel() // layout", "shards.local([param])[0].numel() // layout"),
        ("a rank's zeros are a dummy step", "moves", ".agree(mine) if self.sharded else mine", ".agree(mine) and mine"),
        ("placements looked at once", "local", "not all(map(is_, specs, self._fit))", "not self._fit"),
        ("squares of those who are absent", "_others", "np.flatnonzero(~absent)", "np.arange((~absent).sum())"),
    ),
    *group(
        ERRORS,
        FOLDER + "arguments.py",
        ("two spellings accepted", "_refuse_twice", "other is not None and not isinstance(other, Default)", "False"),
        ("settings of torch's ignored", "refuse", "values.get(name, idle) != idle", "False"),
    ),
)
