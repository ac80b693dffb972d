"""Lightning's Trainer and Fabric: the same bits as a loop by hand, in every precision that a CPU has, and after resumption."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hosts import OPTIONS, assert_equal, leaves, make
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning"),  # Lightning's own
]
DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}
CLIPS = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}
LIMIT = 0.05  # below every gradient's norm here, and below some of its elements
BATCHES = 6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def data() -> DataLoader[Any]:
    inputs = torch.randn(4 * BATCHES, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)


def loss_of(model: Any, batch: list[Tensor]) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


class Module(lightning.LightningModule):
    def __init__(self, name: str, automatic: bool = True) -> None:
        super().__init__()
        self.name, self.automatic_optimization = name, automatic
        self.net = network()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = loss_of(self.net, batch)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make(self.name, self.net.named_parameters())


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, **{"max_epochs": 1, **quiet, **options})


def by_hand(name: str, precision: str = "32-true", clip: str | None = None, accumulate: int = 1, epochs: int = 1) -> Any:
    """The loop that Lightning stands for."""
    dtype = DTYPES[precision]
    model = network().to(dtype)
    optimizer = make(name, model.named_parameters())
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    for index, batch in enumerate(batch for _ in range(epochs) for batch in data()):
        with autocast:
            loss = loss_of(model, [tensor.to(dtype) for tensor in batch])
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip:
                CLIPS[clip](model.parameters(), LIMIT)
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict(), optimizer.state_dict()


def states(trained: lightning.Trainer) -> Any:
    module: Any = trained.lightning_module
    return module.net.state_dict(), trained.optimizers[0].state_dict()


@pytest.mark.slow(every=4)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, *CLIPS])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_automatic_optimization(name: str, precision: str, clip: str | None, accumulate: int, tmp_path: Path) -> None:
    limits = {"gradient_clip_val": LIMIT, "gradient_clip_algorithm": clip} if clip else {}
    run = trainer(tmp_path, precision=precision, accumulate_grad_batches=accumulate, **limits)
    run.fit(Module(name), data())
    assert_equal(states(run), by_hand(name, precision, clip, accumulate))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_manual_optimization(name: str, precision: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, precision=precision)
    run.fit(Module(name, automatic=False), data())
    assert_equal(states(run), by_hand(name, precision))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_resumption(name: str, precision: str, tmp_path: Path) -> None:
    first = trainer(tmp_path, precision=precision)
    first.fit(Module(name), data())
    first.save_checkpoint(tmp_path / "run.ckpt")
    second = trainer(tmp_path, precision=precision, max_epochs=2)
    with second.init_module():  # the checkpoint is read before Lightning makes parameters float64
        module = Module(name)
    second.fit(module, data(), ckpt_path=tmp_path / "run.ckpt")
    assert_equal(states(second), by_hand(name, precision, epochs=2))
    first.fit_loop.max_epochs = 2  # the same trainer again: its teardown has moved the state, setup moves it back
    first.fit(first.lightning_module, data(), ckpt_path=tmp_path / "run.ckpt")
    assert_equal(states(first), states(second))


@pytest.mark.parametrize("name", OPTIONS)
def test_state_that_a_host_replaces_is_the_state(name: str) -> None:
    """Hosts move state away and back (Lightning's teardown and setup): every tensor in it is another one afterwards."""
    model = network()
    optimizer = make(name, model.named_parameters())
    for epoch in range(2):
        for batch in data():
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        if epoch == 0:
            for state in optimizer.state.values():
                for key, value in state.items():
                    state[key], _ = value.clone(), value.fill_(float("nan"))
            _optimizers_to_device([optimizer], torch.device("cpu"))
    assert_equal((model.state_dict(), optimizer.state_dict()), by_hand(name, epochs=2))


class Fused(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make(self.name, self.net.parameters(), amp="fused", global_clipnorm=LIMIT)


def test_unscaling_in_the_launch_excludes_lightnings_clipping(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=LIMIT).fit(Fused("AdamW"), data())
    run = trainer(tmp_path, precision="bf16-mixed")
    run.fit(Fused("AdamW"), data())
    for found, expected in zip(leaves(states(run)[0]).values(), leaves(by_hand("AdamW", "bf16-mixed", "norm")[0]).values(), strict=True):
        torch.testing.assert_close(found, expected)  # torch sums the norm's squares in another order


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_teardown_and_setup_on_a_gpu(name: str, tmp_path: Path) -> None:
    """Fit, which ends with the state on the CPU, and fit again, which moves it back to the GPU."""
    run = trainer(tmp_path, accelerator="gpu", devices=1)
    module = Module(name)
    run.fit(module, data())
    assert {value.device.type for value in leaves(run.optimizers[0].state_dict()["state"]).values()} == {"cpu"}
    run.save_checkpoint(tmp_path / "run.ckpt")
    run.fit_loop.max_epochs = 2
    run.fit(module, data(), ckpt_path=tmp_path / "run.ckpt")
    whole = trainer(tmp_path, accelerator="gpu", devices=1, max_epochs=2)
    whole.fit(Module(name), data())
    assert_equal(states(run), states(whole))


@pytest.mark.parametrize("precision", [name for name in DTYPES if name != "64-true"])  # there Fabric rounds outputs to float32
@pytest.mark.parametrize("name", OPTIONS)
def test_fabric(name: str, precision: Any, tmp_path: Path) -> None:
    """setup, clip_gradients, save and load half-way."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)

    def start() -> tuple[Any, Any]:
        model = network().to(DTYPES[precision])
        return fabric.setup(model, make(name, model.named_parameters()))

    def epoch(model: Any, optimizer: Any) -> None:
        for batch in fabric.setup_dataloaders(data()):
            optimizer.zero_grad()
            fabric.backward(loss_of(model, [tensor.to(DTYPES[precision]) for tensor in batch]))
            fabric.clip_gradients(model, optimizer, max_norm=LIMIT)
            optimizer.step()

    model, optimizer = start()
    assert isinstance(optimizer, torch.optim.Optimizer)
    epoch(model, optimizer)
    fabric.save(tmp_path / "run", {"model": model, "optimizer": optimizer})
    model, optimizer = start()
    fabric.load(tmp_path / "run", {"model": model, "optimizer": optimizer})
    epoch(model, optimizer)
    assert_equal((model.state_dict(), optimizer.state_dict()), by_hand(name, precision, "norm", epochs=2))
