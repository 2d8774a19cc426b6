"""Every optimizer: trains, keeps what was said beforehand, and goes on from a checkpoint bit by bit."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

from tests.training.test_checkpointer import progress
from vfun_cli.checkpoints import safetensors
from vfun_cli.config import optimizers
from vfun_cli.config.optimizers import OPTIMIZERS
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError, EnvironmentFault
from vfun_cli.forecast.measuring.tracker import Tracker
from vfun_cli.imports import named
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.optim import make_optimizer, set_learning_rate, trainable
from vfun_cli.training.state.checkpointer import Checkpointer, checkpoint_bytes
from vfun_cli.training.state.live import TrainedState, trained_parameters

CPU = torch.device("cpu")
RATES = {"prodigy": 1.0, "adafactor": 0.1}
"""At which each learns the task below in a few steps; others at LEARNING_RATE."""
LEARNING_RATE = 1e-2
A_CLASS = "torch.optim.NAdam"
"""Of an installed package, not in the table; it keeps a product of momenta beside its count of steps."""

every = pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.skipif(
        optimizer.module is not None and find_spec(optimizer.module) is None, reason=f"{optimizer.package} is missing"
    ))
    for name, optimizer in OPTIMIZERS.items()
] + [A_CLASS])  # fmt: skip


class Model(nn.Module):
    """Matrices, among them one of 4096 numbers, vectors, a stack of matrices and a weight that begins with zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow = nn.Linear(64, 64), nn.Linear(64, 3)
        self.stack = nn.Parameter(torch.randn(2, 3, 64) / 8)
        self.added = nn.Parameter(torch.zeros(64))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = functional.silu(self.wide(values)) + self.added
        return self.narrow(hidden) + torch.einsum("bc,soc->bo", hidden, self.stack)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(name: str, *arguments: str, **more: Any) -> RunConfig:
    rate = RATES.get(name, LEARNING_RATE)
    options = {"learning_rate": rate, "strategy": "single", "optimizer": name, "optimizer_args": arguments}
    return RunConfig(**{**options, **more})


def begun(config: RunConfig, slow: tuple[str, ...] = ()) -> TrainedState:
    accelerator, model = Accelerator(cpu=True), Model()
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    model, optimizer = accelerator.prepare(model, make_optimizer(trainable(model), config, CPU, slow=slow))
    return TrainedState(
        accelerator=accelerator, model=model, optimizer=optimizer, kind=optimizers.find(config.optimizer),
        moments_bytes=optimizers.state_bytes(config, shapes),
    )  # fmt: skip


def train(state: TrainedState, steps: range, config: RunConfig) -> list[float]:
    """Losses; the batches and rates are functions of the step."""
    losses = []
    for step in steps:
        batch = torch.randn(16, 64, generator=torch.Generator().manual_seed(step % 3))
        loss = (state.model(batch) - batch[:, :3].cumsum(dim=1)).square().mean()
        loss.backward()
        set_learning_rate(state.optimizer, config.learning_rate * (1 - 0.01 * step))
        state.optimizer.step()
        state.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(state: TrainedState) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in state.model.parameters())


@pytest.fixture
def saver(tmp_path: Path) -> Checkpointer:
    (tmp_path / "run").mkdir()
    (tmp_path / "config.json").write_text("{}")
    return Checkpointer(
        RunDir(tmp_path / "run"), "single", keep=None, config_files={"config.json": tmp_path / "config.json"}
    )


def saved(saver: Checkpointer, state: TrainedState, step: int) -> Path:
    run_state = progress(step)
    return saver.save(state, run_state | {"run_config": run_state["run_config"] | {"optimizer": state.kind.name}})


@every
def test_an_optimizer_learns(name: str) -> None:
    config = config_of(name)
    losses = train(begun(config), range(60), config)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


@every
@pytest.mark.parametrize("slow", [(), ("wide.weight", "narrow.bias")])
def test_a_resumed_optimizer_takes_the_very_steps(name: str, slow: tuple[str, ...], saver: Checkpointer) -> None:
    if slow and optimizers.find(name).one_rate:
        pytest.skip("one learning rate for all")
    config = config_of(name)
    straight = begun(config, slow)
    train(straight, range(5), config)
    path = saved(saver, straight, 5)
    expected = train(straight, range(5, 9), config)
    again = begun(config, slow)
    saver.load(again, path)
    assert train(again, range(5, 9), config) == expected
    assert weights(again) == weights(straight)


@every
def test_slow_weights_move_half_as_far(name: str) -> None:
    if optimizers.find(name).one_rate:
        pytest.skip("one learning rate for all")
    slow, config = ("wide.weight", "narrow.bias"), config_of(name)
    moved = []
    for names in ((), slow):
        state, before = begun(config, names), Model()
        train(state, range(1), config)
        parameters = zip(before.named_parameters(), trained_parameters(state).values(), strict=True)
        moved.append({key: (now - then).detach() for (key, then), now in parameters})
    for key, whole in moved[0].items():
        share = 0.5 if key in slow else 1.0
        torch.testing.assert_close(moved[1][key], share * whole, rtol=1e-3, atol=1e-6)


@every
def test_a_checkpoint_before_the_first_step_begins_the_run(name: str, saver: Checkpointer) -> None:
    config = config_of(name)
    straight = begun(config)
    path = saved(saver, straight, 0)
    again = begun(config)
    saver.load(again, path)
    assert train(again, range(3), config) == train(straight, range(3), config)


@every
def test_the_bytes_of_what_it_keeps_are_known_beforehand(name: str, saver: Checkpointer) -> None:
    config = config_of(name)
    state = begun(config)
    train(state, range(2), config)
    path = saved(saver, state, 2)
    tensors = safetensors.read_file(path / "model/optimizer.safetensors")
    held = sum(tensor.nbytes for key, tensor in tensors.items() if not key.startswith("param_groups."))
    said = state.moments_bytes
    assert said is not None
    if name == "prodigy":
        said -= 4 * 64 - 4  # a parameter that begins with zeros needs no copy of them
    if name in OPTIMIZERS:
        assert held == said
    taken = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert taken <= checkpoint_bytes(state)


ON_A_GPU = {"adafactor": ("foreach=true",), A_CLASS: ("foreach=true",)}
"""What torch does there where nothing is said; on a CPU it takes one tensor after another."""


@every
def test_the_copies_that_a_step_makes_are_known_beforehand(name: str) -> None:
    known, made = copies(config_of(name, *ON_A_GPU.get(name, ())))
    # A class that is not in the table is taken for the largest of torch's, which makes twice as much as the others.
    least = 0.95 if name in OPTIMIZERS else 0.45
    assert least * known <= made <= known + 1000


@pytest.mark.parametrize("foreach", ["true", "false"])
def test_the_copies_of_adamw_in_several_passes_are_known_beforehand(foreach: str) -> None:
    known, made = copies(config_of("adamw", "fused=false", f"foreach={foreach}"))
    assert 0.95 * known <= made <= known + 1000


def copies(config: RunConfig) -> tuple[int, int]:
    """Bytes that a step makes and lets go, as the table says and as it is."""
    shapes = [(128, 128)] * 6 + [(256, 256)] * 2
    parameters = {str(number): nn.Parameter(torch.randn(shape)) for number, shape in enumerate(shapes)}
    optimizer = make_optimizer(parameters, config, CPU)
    for tracker in (Tracker(), Tracker()):  # the first step makes what stays, too
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        with tracker:
            optimizer.step()
    return optimizers.step_bytes(config, shapes), tracker.peak


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is missing")
def test_an_8_bit_checkpoint_holds_at_most_two_bytes_and_a_tenth_for_each_parameter(saver: Checkpointer) -> None:
    config, accelerator = config_of("adamw8bit"), Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    model, optimizer = accelerator.prepare(model, make_optimizer(trainable(model), config, CPU))
    state = TrainedState(accelerator=accelerator, model=model, optimizer=optimizer, kind=OPTIMIZERS["adamw8bit"])
    model(torch.randn(4, 256)).square().mean().backward()
    optimizer.step()
    file = saved(saver, state, 1) / "model/optimizer.safetensors"
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * count < file.stat().st_size < 2.1 * count


def test_what_another_optimizer_kept_is_refused(saver: Checkpointer) -> None:
    config = config_of("muon")
    state = begun(config)
    train(state, range(1), config)
    path = saved(saver, state, 1)
    with pytest.raises(ConfigError, match="optimizer muon, which means nothing to adafactor"):
        saver.load(begun(config_of("adafactor")), path)


@pytest.mark.parametrize("arguments", ["betas=3", "rho=1"])
def test_arguments_that_a_class_does_not_take_are_an_error_of_the_option(arguments: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer torch\.optim\.RAdam does not take lr=0.01, .*="):
        begun(config_of("torch.optim.RAdam", arguments))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is None or shutil.which("c++") is None, reason="torchao or c++ is missing")
def test_8_bits_resume_where_their_update_is_compiled(saver: Checkpointer) -> None:
    """As on a GPU: the device only says whether it is."""
    config, kind, states = config_of("adamw8bit"), OPTIMIZERS["adamw8bit"], []
    for _ in range(2):
        accelerator, model = Accelerator(cpu=True), nn.Linear(64, 64, bias=False)
        torch.nn.init.ones_(model.weight)
        made = make_optimizer(trainable(model), config, torch.device("cuda"))
        model, optimizer = accelerator.prepare(model, made)
        states.append(TrainedState(accelerator=accelerator, model=model, optimizer=optimizer, kind=kind))

    def step(state: TrainedState, number: int) -> None:
        batch = torch.randn(4, 64, generator=torch.Generator().manual_seed(number))
        state.model(batch).sub(batch.cumsum(dim=1)).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    straight, again = states
    step(straight, 0)
    path = saved(saver, straight, 1)
    step(straight, 1)
    saver.load(again, path)
    set_learning_rate(again.optimizer, LEARNING_RATE)
    step(again, 1)
    assert weights(again) == weights(straight)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is missing")
def test_a_gpu_needs_a_compiler_for_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"--optimizer adamw8bit needs a C\+\+ compiler"):
        make_optimizer(trainable(Model()), config_of("adamw8bit"), torch.device("cuda"))


@every
def test_the_arguments_in_the_table_are_those_of_the_constructor(name: str) -> None:
    optimizer = optimizers.find(name)
    taken = signature(named(optimizer.place)).parameters.keys()
    assert {*optimizer.takes, *optimizer.given, *(optimizer.arguments or ())} <= taken


@every
def test_constructing_one_reads_no_value(name: str) -> None:
    meta = trainable(Model().to("meta"))
    made = make_optimizer(meta, config_of(name), torch.device("meta"))
    assert [parameter for group in made.param_groups for parameter in group["params"]]
