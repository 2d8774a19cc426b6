"""What the trainer's objectives make of the original implementations' latents, noise and timesteps."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vfun_cli.errors import CheckpointError
from vfun_cli.families import FAMILIES
from vfun_cli.training.objectives import DDPM, FlowMatching, Objective, make_objective

GOLDEN = Path(__file__).parents[1] / "golden"
OWNERS = {
    "wan_s2v": "wan-s2v",
    "wan_fun_control/v11": "wan-fun-control",
    "hunyuanvideo/t2v": "hunyuanvideo-t2v",
    "hunyuanvideo/t2v_image": "hunyuanvideo-t2v",
    "hunyuanvideo/i2v_token_replace": "hunyuanvideo-i2v",
    **{f"easyanimate_v5.1_control/{case.parent.name}": "easyanimate-v5.1-control"
       for case in sorted(GOLDEN.glob("easyanimate_v5.1_control/*/meta.json"))},
    **{f"easyanimate_v5_control/{case.parent.name}": "easyanimate-v5-control"
       for case in sorted(GOLDEN.glob("easyanimate_v5_control/*/meta.json"))},
    **{f"cogvideox_fun/{case.parent.name}": "cogvideox-fun"
       for case in sorted(GOLDEN.glob("cogvideox_fun/*/meta.json"))},
}  # fmt: skip
SHIFTS = {
    "wan-s2v": 3.0,
    "wan-fun-control": 5.0,
    "hunyuanvideo-t2v": 7.0,
    "hunyuanvideo-i2v": 7.0,
    "easyanimate-v5.1-control": 1.0,
}
SCHEDULE = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
}
"""As released: a class that training does not use, a shift that it ignores."""


@dataclass
class Drawn:
    """The position of one sample of a golden batch: it draws what the original drew."""

    noise: Tensor
    index: int

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        assert purpose == "noise" and tuple(self.noise.shape) == shape
        return self.noise

    def numpy(self, purpose: str) -> "Drawn":
        assert purpose == "timestep"
        return self

    def integers(self, end: int) -> int:
        assert end == 1000
        return self.index


def objective_of(family: str, folder: Path, **schedule: Any) -> Objective:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULE, **schedule}))
    spec = FAMILIES[family]
    return make_objective(spec.model.objective, spec.model.objective_options, folder)


def golden(case: str) -> dict[str, Tensor]:
    """Latents, noise, timestep and, where the original kept them, noisy, target, prediction and loss."""
    folder = GOLDEN / case
    if (folder / "io.safetensors").is_file():
        return load_file(folder / "io.safetensors")
    outputs = load_file(folder / "outputs.safetensors")
    prefix = "fp32.drop0." if case == "wan_s2v" else "fp32."
    found = {**load_file(folder / "inputs.safetensors"), "pred": outputs[prefix + "pred"]}
    return {**found, "loss": outputs[prefix + "loss"], "timestep": found["timesteps"]}


def indices(objective: Objective, timesteps: Tensor) -> list[int]:
    """Which draws give these timesteps."""
    if isinstance(objective, DDPM):
        return timesteps.tolist()
    assert isinstance(objective, FlowMatching)
    table = objective.sigmas() * 1000
    return [int((table - timestep).abs().argmin()) for timestep in timesteps]


def corrupted(objective: Objective, tensors: dict[str, Tensor]) -> Any:
    drawn = indices(objective, tensors["timestep"])
    keys: Sequence[Any] = [Drawn(noise, index) for noise, index in zip(tensors["noise"], drawn, strict=True)]
    return objective.corrupt(tensors["latents"], keys)


def test_every_golden_batch_is_here() -> None:
    found = {str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.glob("**/*.safetensors")}
    of_training = {case for case in found if not case.startswith("sampling/")}
    assert {case for case in of_training if "noise" in golden_names(case)} == set(OWNERS)
    assert set(OWNERS.values()) == set(FAMILIES)


def golden_names(case: str) -> set[str]:
    found: set[str] = set()
    for path in (GOLDEN / case).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update(file.keys())
    return found


@pytest.mark.parametrize("case", OWNERS)
def test_noisy_latents_targets_and_losses_are_the_originals(case: str, tmp_path: Path) -> None:
    tensors, objective = golden(case), objective_of(OWNERS[case], tmp_path)
    found = corrupted(objective, tensors)

    torch.testing.assert_close(found.timesteps, tensors["timestep"], rtol=0, atol=0)
    if case == "hunyuanvideo/i2v_token_replace":  # its adapter puts the given image there
        found.noisy[:, :, :1] = tensors["cond"]
    noisy, target = tensors.get("noisy"), tensors.get("target")
    if noisy is None:  # the Wan files keep what they are made of
        sigma = tensors["sigmas"].view(-1, 1, 1, 1, 1)
        noisy, target = torch.lerp(tensors["latents"], tensors["noise"], sigma), tensors["noise"] - tensors["latents"]
    torch.testing.assert_close(found.noisy, noisy, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.target, target, atol=1e-6, rtol=0)
    mask = None
    if case.startswith("hunyuanvideo"):  # the original leaves the first latent frame out
        mask = torch.ones(1, 1, found.noisy.shape[2], 1, 1)
        mask[:, :, 0] = 0
    loss = objective.loss(tensors["pred"], found.target, mask)
    torch.testing.assert_close(loss, tensors["loss"][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", SHIFTS)
def test_each_flow_family_trains_with_the_table_of_its_shift_that_diffusers_computes(
    family: str, tmp_path: Path
) -> None:
    objective = objective_of(family, tmp_path)
    assert isinstance(objective, FlowMatching)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFTS[family])
    assert torch.equal(objective.sigmas(), scheduler.sigmas)
    keys: Sequence[Any] = [Drawn(torch.zeros(1, 1, 1, 1), index) for index in range(1000)]
    assert torch.equal(objective.corrupt(torch.zeros(1000, 1, 1, 1, 1), keys).timesteps, scheduler.timesteps)


@pytest.mark.parametrize("family", ["cogvideox-fun", "easyanimate-v5-control"])
def test_a_schedule_that_predicts_noise_trains_on_the_noise(family: str, tmp_path: Path) -> None:
    tensors = golden("cogvideox_fun/2b_native")
    found = corrupted(objective_of(family, tmp_path, prediction_type="epsilon"), tensors)
    assert torch.equal(found.target, tensors["noise"])
    torch.testing.assert_close(found.noisy, tensors["noisy"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["cogvideox-fun", "easyanimate-v5-control"])
def test_other_prediction_types_are_refused_with_those_that_train(family: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'sample' cannot be trained; known: v_prediction, epsilon"):
        objective_of(family, tmp_path, prediction_type="sample")


def test_a_directory_without_a_schedule_is_refused_with_a_way_out(tmp_path: Path) -> None:
    spec = FAMILIES["cogvideox-fun"]
    with pytest.raises(CheckpointError, match="scheduler cannot be loaded") as caught:
        make_objective(spec.model.objective, spec.model.objective_options, tmp_path)
    assert "download it again" in caught.value.hint
