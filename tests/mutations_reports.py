"""Wrong versions of what `describe` and `fused-kopt doctor` say, one edit each (see `mutations.py`)."""

from mutations import group

REPORTS = (
    *group(
        "test_describe.py",
        "fused_kopt/description.py",
        ("one launch whatever the gradients' dtypes", "_count", "(number, g.dtype)", "number"),
        ("one launch whatever the rounds", "_count", "(number, g.dtype)", "g.dtype"),
        ("sparse gradients in the dense launch", "_count", " + sum(g.layout != torch.strided for g, _ in pairs)", ""),
        ("launches on the reference", "_bucket", '0 if chosen[0] == "reference" else _count(pairs)', "_count(pairs)"),
        ("norms without launches", "", 'NORM_LAUNCHES = {"triton": 2', 'NORM_LAUNCHES = {"triton": 1'),
        ("gradients written back", "_moved", "gradient.dtype.itemsize + copies", "2 * gradient.dtype.itemsize + copies"),
        ("copies are free", "_moved", " + copies)", ")"),
        ("every executor was asked for", "_choose", 'if executor != "auto":', "if True:"),
    ),
    *group(
        "test_describe.py",
        "fused_kopt/planes.py",
        ("slots in the variable's dtype", "of", "layout.compute_dtype(variables[0].dtype)", "variables[0].dtype"),
        ("slots without padding", "of", "-(-v.numel() // alignment) * alignment", "v.numel()"),
        (
            "slots of a variable for each of its gradients",
            "distinct",
            "list({id(variable): variable for _, variable in pairs}.values())",
            "[v for _, v in pairs]",
        ),
        ("slots are written only", "moved", "2 * sum", "sum"),
    ),
    *group(
        "test_memory.py -k 'not process'",
        "fused_kopt/planes.py",
        ("every element has its scale", "moved", " // plane.group", ""),
        ("padding that is used", "of", "(whole - used)", "whole"),
        ("one bucket for all policies", "owned", "names, policy.planes(variable.dtype, groups), policy, part)", "names, (), None)"),
    ),
    *group(
        "test_memory.py -k 'not process'",
        "fused_kopt/memory.py",
        ("no tables", "tables", "8 * self.programs() + rows", "rows"),
        ("temporaries of one slot", "_temporaries", "2 * planes", "2"),
        ("frozen parameters train", "estimate_memory", " if p.requires_grad", ""),
        ("the variable's gradient dtype only", "_gradient", "dtype or variable.dtype", "variable.dtype"),
        ("copies are free here too", "copies", "own + other + twice", "twice"),
    ),
    *group(
        "test_precision_learning.py -k 'error_and or bytes or moves'",
        "fused_kopt/commands/experiment.py",
        ("an error without its root", "compare", ".sqrt()", ""),
        ("a bias without sign", "compare", "(difference * way).sum()", "(difference * way).sum().abs()"),
        ("the control has a master", "", 'CONTROL: Precision(slots="bfloat16")', 'CONTROL: Precision(master="kahan")'),
        ("a gradient that is read twice", "per_element", "3 * own", "4 * own"),
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
