"""Child processes made by os.fork after the parent has used OpenMP's threads, and optimizers of several threads at once."""

import pytest
import support
import torch
from support import in_threads, randn

# The child's torch would wait for OpenMP's threads too: it makes no tensor of more elements than one thread takes.
FORKED = """
import os, signal, warnings
import torch, fused_kopt, support

warnings.simplefilter("ignore")  # Python's own, about forks of processes with threads
torch.set_num_threads(4)
executor, size = "compiled", 300_001
variables, gradients = [support.randn(size), support.randn(7)], [support.randn(size, seed=1), support.randn(7, seed=2)]
optimizer = fused_kopt.Adam(executor=executor, global_clipnorm=1.0)
pairs = list(zip(gradients, variables))
optimizer.apply_gradients(pairs)
twin, twins = support.build("sgd", executor, stats_every=1), [v.clone() for v in variables]
twin.apply_gradients(list(zip(gradients, twins)))
if not os.fork():
    signal.alarm(60)
    for _ in range(2):
        optimizer.apply_gradients(pairs)
        twin.apply_gradients(list(zip(gradients, twins)))
    new = torch.zeros(5)
    fused_kopt.SGD(1.0, executor=executor).apply_gradients([(torch.ones(5), new)])
    assert new.tolist() == [-1.0] * 5
    print([v[::997].tolist() for v in variables + twins], twin.last_stats(), flush=True)
    os._exit(0)
_, status = os.wait()
assert status == 0, f"the child ended with status {status}; 14 is the alarm"
for _ in range(2):
    optimizer.apply_gradients(pairs)
    twin.apply_gradients(list(zip(gradients, twins)))
print([v[::997].tolist() for v in variables + twins], twin.last_stats())
"""


def test_a_forked_child_goes_on() -> None:
    """The compiled executor, with threads; `test_reliability_c2.py` forks the others."""
    child, parent = support.python(FORKED).splitlines()
    assert child == parent


@pytest.mark.parametrize(("executor", "size"), [("compiled", 100_000), ("reference", 3000), ("triton", 3000)])
def test_measured_steps_of_several_threads(executor: str, size: int) -> None:
    """Optimizers that step at once keep their sums apart; one that is shared counts every step."""
    rules, shared = ("adam", "momentum", "ftrl", "lion"), support.build("sgd", executor, stats_every=1)
    common = torch.zeros(size)

    def own(rule: str) -> list[float]:
        optimizer, variable, found = support.build(rule, executor, stats_every=1), randn(size), []
        for step in range(5):
            optimizer.apply_gradients([(randn(size, seed=step), variable)])
            stats = optimizer.last_stats()
            assert stats is not None
            found += [stats["gradient_norm"], stats["update_norm"], stats["weight_norm"]]
        return found

    alone, together = [own(rule) for rule in rules], [[0.0]] * len(rules)

    def work(index: int) -> None:
        together[index] = own(rules[index])
        for _ in range(5):
            shared.apply_gradients([(torch.ones(size), common)])

    in_threads(work, len(rules))
    assert together == alone
    stats = shared.last_stats()
    assert stats is not None
    assert stats["iterations"] == int(shared.iterations) == 20
    assert stats["gradient_norm"] == pytest.approx(size**0.5, rel=1e-12)
