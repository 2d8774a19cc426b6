"""What training and encoders load by torch, DCP and DeepSpeed runs nothing that a file asks for."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from transformers import T5Config, T5EncoderModel

from vfun_cli.errors import CheckpointError
from vfun_cli.modeling.encoders.captions import UMT5, load_tokenizer
from vfun_cli.modeling.encoders.pretrained import load_model
from vfun_cli.modeling.weights import load_pth
from vfun_cli.training.state.formats import FORMATS
from vfun_cli.training.state.live import TrainedState


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return Payload(tmp_path / "ran")


@pytest.fixture
def state() -> TrainedState:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=False)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return TrainedState(accelerator=Accelerator(cpu=True), model=model, optimizer=optimizer)


def refused(load: Any, payload: Payload) -> str:
    with pytest.raises(CheckpointError) as error:
        load()
    assert not payload.file.exists()
    assert "refused" in error.value.message and error.value.exit_code == 5
    return error.value.message


def test_a_sharded_checkpoint_comes_back_and_its_plan_runs_nothing(
    state: TrainedState, payload: Payload, tmp_path: Path
) -> None:
    FORMATS["dcp"].save(state, tmp_path)
    before = state.model.weight.detach().clone()
    state.optimizer.step()
    FORMATS["dcp"].load(state, tmp_path)
    assert torch.equal(cast(torch.Tensor, state.model.weight), before)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(payload))
    assert "posix.system" in refused(lambda: FORMATS["dcp"].load(state, tmp_path), payload)


def test_a_value_in_the_shards_runs_nothing(state: TrainedState, payload: Payload, tmp_path: Path) -> None:
    FORMATS["dcp"].save(state, tmp_path / "honest")
    names = ["step", "exp_avg", "exp_avg_sq"]
    moments = {
        name: {part: state.optimizer.state[p][part] for part in names} for name, p in state.model.named_parameters()
    }
    content = {"model": {**state.model.state_dict(), "weight": payload}, "optimizer": {"state": moments}}
    dcp.save(content, checkpoint_id=tmp_path / "planted")
    refused(lambda: FORMATS["dcp"].load(state, tmp_path / "planted"), payload)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeeds_files_are_loaded_and_run_nothing(
    stage: str, samples: Path, payload: Payload, tmp_path: Path
) -> None:
    folder = shutil.copytree(samples / stage / "model", tmp_path / "model")
    files = sorted(str(file) for file in folder.rglob("*_states.pt"))
    found: list[Any] = []
    unguarded = SimpleNamespace(load=lambda path, map_location=None: torch.load(path, weights_only=False))

    def load_checkpoint(*_: Any, **__: Any) -> tuple[Any, Any]:
        """As DeepSpeed's engine loads: every file through its checkpoint engine."""
        found[:] = [engine.checkpoint_engine.load(file, map_location="cpu") for file in files]
        return found, {}

    engine = SimpleNamespace(checkpoint_engine=unguarded, load_checkpoint=load_checkpoint)
    FORMATS["deepspeed"].load(cast(Any, SimpleNamespace(model=engine)), folder)
    assert len(found) == len(files) >= 3
    for file, content in zip(files, found, strict=True):
        honest = torch.load(file, weights_only=False)
        assert repr(content) == repr(honest) or content.keys() == honest.keys()
    torch.save({"optimizer_state_dict": payload}, files[0])
    assert files[0] in refused(
        lambda: FORMATS["deepspeed"].load(cast(Any, SimpleNamespace(model=engine)), folder), payload
    )


def test_weights_of_encoders_run_nothing(payload: Payload, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": payload}, tmp_path / "weights.pth")
    assert "posix.system" in refused(lambda: load_pth(tmp_path / "weights.pth"), payload)
    T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)).save_pretrained(
        tmp_path
    )
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2), "b": payload}, tmp_path / "pytorch_model.bin")
    message = refused(lambda: load_model(T5EncoderModel, tmp_path, dtype=torch.float32), payload)
    assert "pytorch_model.bin" in message and "torch.load" not in message


def test_a_tokenizer_that_names_a_program_of_its_own_is_refused_unasked(payload: Payload, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"open({str(payload.file)!r}, 'w')\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(UMT5, tmp_path)
    assert not payload.file.exists()
