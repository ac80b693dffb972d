"""Sparse gradients as autograd makes them: expanded values, aliases, and optimizers moved between devices."""

import io
from typing import Any

import pytest
import torch

import fused_kopt
from fused_kopt import optimizers

NAMES = ["SGD", "RMSprop", "Adam", "Adadelta", "Adagrad", "Adamax", "Nadam", "Ftrl", "Lion"]


@pytest.mark.parametrize("executor", ["reference", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_expanded_values_of_an_embedding(name: str, executor: Any) -> None:
    """`embedding(i).sum()` gives values of stride 0 over one element."""
    results = []
    for expand in (True, False):
        embedding = torch.nn.Embedding(5, 4, sparse=True, _weight=torch.arange(20.0).reshape(5, 4))
        optimizer = getattr(optimizers, name)(0.1, executor=executor)
        for _ in range(2):
            with fused_kopt.GradientTape() as tape:
                loss = embedding(torch.tensor([3, 1, 3])).sum()
            gradient = tape.gradient(loss, embedding.weight)
            if not expand:
                gradient = torch.sparse_coo_tensor(gradient._indices(), gradient._values().contiguous(), (5, 4), check_invariants=True)
            optimizer.apply_gradients([(gradient, embedding.weight)])
        results.append(embedding.weight.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.arange(20.0).reshape(5, 4))


@pytest.mark.parametrize("executor", ["reference", "triton"])
def test_values_that_another_pair_writes_count_as_they_were(executor: Any) -> None:
    first, second = torch.full((1, 4), 0.5), torch.zeros(3, 4)
    gradient = torch.sparse_coo_tensor(torch.tensor([[2]]), first, (3, 4), check_invariants=True)
    fused_kopt.SGD(1.0, executor=executor).apply_gradients([(torch.full((1, 4), 0.25), first), (gradient, second)])
    assert second[2].tolist() == [-0.5] * 4


def test_map_location_moves_the_buckets_with_their_tensors() -> None:
    variable = torch.ones(3)
    optimizer = fused_kopt.Nadam()
    optimizer.apply_gradients([(torch.ones(3), variable)])
    buffer = io.BytesIO()
    torch.save((optimizer, variable), buffer)
    buffer.seek(0)
    loaded, moved = torch.load(buffer, map_location="meta", weights_only=False)
    assert [(key[0].type, bucket.device.type) for key, bucket in loaded._state.buckets.items()] == [("meta", "meta")]
    assert loaded.get_slot(moved, "m").device.type == "meta"


@pytest.mark.parametrize("name", NAMES)
def test_loaded_optimizers_go_on(name: str) -> None:
    variable = torch.ones(3)
    optimizer = getattr(optimizers, name)(0.1)
    optimizer.apply_gradients([(torch.full((3,), 0.5), variable)])
    buffer = io.BytesIO()
    torch.save((optimizer, variable), buffer)
    buffer.seek(0)
    loaded, copy = torch.load(buffer, map_location="cpu", weights_only=False)
    for o, v in ((optimizer, variable), (loaded, copy)):
        o.apply_gradients([(torch.full((3,), -0.25), v)])
    assert torch.equal(variable, copy)
    assert len(loaded.weights) == len(optimizer.weights)
