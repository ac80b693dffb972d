"""Benchmarks: providers x optimizers x workloads, measured in one run on the same tensors. `python -m perf --help`."""
