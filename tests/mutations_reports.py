"""Wrong versions of what `describe` and `fused-kopt doctor` say, one edit each (see `mutations.py`)."""

from mutations import group

REPORTS = (
    *group(
        "test_describe.py",
        "fused_kopt/description.py",
        ("one launch whatever the gradients' dtypes", "_count", "(number, g.dtype)", "number"),
        ("one launch whatever the rounds", "_count", "(number, g.dtype)", "g.dtype"),
        ("sparse gradients in the dense launch", "_count", " + sum(g.layout != torch.strided for g, _ in pairs)", ""),
        ("launches on the reference", "describe", '0 if chosen[device][0] == "reference" else _count(mine)', "_count(mine)"),
        ("norms without launches", "", 'NORM_LAUNCHES = {"triton": 2', 'NORM_LAUNCHES = {"triton": 1'),
        ("gradients written back", "_moved", "gradient.dtype.itemsize + copies", "2 * gradient.dtype.itemsize + copies"),
        ("slots in the variable's dtype", "_moved", "layout.compute_dtype(variable.dtype).itemsize", "variable.dtype.itemsize"),
        ("copies are free", "_moved", " + copies)", ")"),
        ("slots without padding", "describe", "-(-v.numel() // alignment) * alignment", "v.numel()"),
        ("slots of a variable for each of its gradients", "describe", "list({id(v): v for _, v in mine}.values())", "[v for _, v in mine]"),
        ("every executor was asked for", "_choose", 'if executor != "auto":', "if True:"),
    ),
    *group(
        "test_doctor.py",
        "fused_kopt/commands/doctor.py",
        ("exit 0 with a problem", "doctor", 'return 1 if counts["problem"] else 0', "return 0"),
        ("executors trusted untried", "_executor", "reason = trial(executor, device)", "reason = None"),
        ("a shared cache is fine", "_cache", 'if folder.parent.name == ".cache":', "if True:"),
        ("auto takes what fails", "executors", ' * (finding.found == "works")', ""),
        ("remedies left out", "doctor", "if finding.mend:", "if False:"),
    ),
    *group(
        "test_doctor.py",
        "fused_kopt/commands/packages.py",
        ("any version will do", "_required", "if not requirement.specifier.contains(version, prereleases=True):", "if False:"),
        ("any backend of Keras will do", "_keras", '"ok" if backend == "torch" else "attention"', '"ok"'),
    ),
)
