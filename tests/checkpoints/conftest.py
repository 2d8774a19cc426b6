"""Checkpoints written by the real engines, made once per session."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from write_sample import FROZEN, SHAPES, sample_moments, sample_weights

from tests.two_ranks import run_on_two_ranks


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever reads ``samples`` waits for a launch."""
    for item in items:
        if "samples" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one checkpoint per strategy, all of the same weights."""
    directory = tmp_path_factory.mktemp("samples")
    run_on_two_ranks(Path(__file__).with_name("write_sample.py"), directory)
    model = directory / "single" / "model"
    model.mkdir(parents=True)
    save_file(sample_weights(), model / "model.safetensors")
    save_file({name: value * 2 for name, value in sample_weights().items()}, model / "ema.safetensors")
    moments = {f"{name}.{key}": value for name, parts in sample_moments().items() for key, value in parts.items()}
    steps = {f"{name}.step": np.array(1, np.float32) for name in SHAPES}
    save_file(moments | steps, model / "optimizer.safetensors")
    return directory


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released model directory in two shards: other trainable weights, frozen ones in float32."""
    directory = tmp_path_factory.mktemp("base")
    rng = np.random.default_rng(5)
    shapes = {**SHAPES, **FROZEN}
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    half = len(tensors) // 2
    for number, part in enumerate((list(tensors)[:half], list(tensors)[half:]), start=1):
        file = directory / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file)
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    (directory / "config.json").write_text('{"dim": 5}')
    return directory
