"""`fused-kopt info`: versions, devices, executors."""

import os
import platform

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fused_kopt
from fused_kopt import execute
from fused_kopt.commands.common import why_not
from fused_kopt.execute import EXECUTORS


def info(console: Console) -> int:
    """Print versions, devices and executors. Returns the exit code, 0."""
    cards, table = [torch.device("cuda", index) for index in range(torch.cuda.device_count())], Table(show_header=False)
    rows = {"fused_kopt": fused_kopt.__version__, "python": platform.python_version(), "torch": torch.__version__}
    rows |= {"numpy": np.__version__, "triton": "unavailable", "platform": platform.platform()}
    if execute.why_not_triton() is None:
        import triton

        rows["triton"] = triton.__version__
    rows["cpu"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    rows["cuda"] = ", ".join(map(torch.cuda.get_device_name, cards)) or "no device"
    for executor in (e for e in EXECUTORS if e != "auto"):
        reason = why_not(executor)
        rows[f"executor {executor}"] = "[green]available[/]" if reason is None else f"[yellow]unavailable[/]: {escape(reason)}"
    rows["executor auto"] = ", ".join(f"{execute.choose('auto', device)} on {device}" for device in (torch.device("cpu"), *cards))
    # a setting of the thread, which torch.set_flush_denormal and libraries built with -ffast-math change
    kept = np.float32(1e-38) * np.float32(0.1) != 0
    rows["float32 denormals"] = "kept" if kept else "[yellow]flushed to zero[/]: results below 1.2e-38 depend on the thread"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    return 0
