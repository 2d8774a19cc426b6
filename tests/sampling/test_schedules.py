"""The noise levels of each family are the released ones."""

import json
import logging
from pathlib import Path

import pytest
import torch

from tests.golden_vaes import GOLDEN
from vfun_cli import families
from vfun_cli.errors import CheckpointError
from vfun_cli.sampling.schedules import make_schedule

RELEASED = json.loads((GOLDEN / "sampling/schedules.json").read_text())
DDIM = json.loads((GOLDEN / "sampling/cogvideox_fun/2b_text/meta.json").read_text())["scheduler_config"]
CASES = {
    "wan_s2v_flow_40": ("wan-s2v", 40),
    "wan_s2v_flow_25": ("wan-s2v", 25),
    "wan_fun_flow_50": ("wan-fun-control", 50),
    "wan_fun_flow_25": ("wan-fun-control", 25),
    "hunyuan_flow_40": ("hunyuanvideo-t2v", 40),
    "hunyuan_flow_50": ("hunyuanvideo-i2v", 50),
    "hunyuan_flow_25": ("hunyuanvideo-t2v", 25),
    "easyanimate_v5.1_flow_50": ("easyanimate-v5.1-control", 50),
    "ddim_trailing_50": ("cogvideox-fun", 50),
    "ddim_trailing_25": ("easyanimate-v5-control", 25),
}
STEPS = [1, 2, 5, 25, 40]
"""Those that divide 1000: of others, the released DDIM leaves alpha[0] of noise, which is 0.0009."""


def scheduler_folder(folder: Path, **changes: object) -> Path:
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(DDIM | changes))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_noise_levels_are_the_released_ones(case: str, tmp_path: Path) -> None:
    family, steps = CASES[case]
    schedule = make_schedule(families.find(family), scheduler_folder(tmp_path), steps)
    wanted = RELEASED[case]
    if "sigmas" in wanted:
        torch.testing.assert_close(schedule.scheduler.sigmas, torch.tensor(wanted["sigmas"]), atol=1e-6, rtol=0)
        torch.testing.assert_close(schedule.timesteps, torch.tensor(wanted["timesteps"]), atol=1e-3, rtol=0)
    else:
        assert schedule.timesteps.tolist() == wanted["timesteps"]
        alphas = schedule.scheduler.alphas_cumprod[schedule.timesteps]
        torch.testing.assert_close(alphas, torch.tensor(wanted["alphas"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("steps", STEPS)
def test_a_perfect_model_lands_on_the_clean_latents(family: str, steps: int, tmp_path: Path) -> None:
    spec = families.find(family)
    schedule = make_schedule(spec, scheduler_folder(tmp_path), steps)
    clean, noise = torch.randn(2, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(7))
    latents = noise
    assert len(schedule.timesteps) == steps
    for timestep in schedule.timesteps:
        if spec.model.sampler == "ddim":  # v = sqrt(a) eps - sqrt(1 - a) x0, where x holds the noise
            signal = schedule.scheduler.alphas_cumprod[timestep].sqrt()
            amount = (1 - signal**2).sqrt()
            velocity = signal * (latents - signal * clean) / amount - amount * clean
        else:
            velocity = (latents - clean) / (timestep / 1000)
        latents = schedule.step(velocity, timestep, latents)
    torch.testing.assert_close(latents, clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_last_steps_begin_where_the_whole_way_would_be(family: str, tmp_path: Path) -> None:
    spec, folder = families.find(family), scheduler_folder(tmp_path)
    whole, part = (make_schedule(spec, folder, 10) for _ in range(2))
    part.last(4)
    assert part.timesteps.tolist() == whole.timesteps[6:].tolist()
    clean, noise = torch.randn(2, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(7))
    begun = part.noised(clean, noise)
    assert not torch.equal(begun, noise)
    stepped = part.step(torch.zeros_like(noise), part.timesteps[0], begun)
    assert stepped.shape == noise.shape and not torch.equal(stepped, clean)


def test_a_schedule_that_would_cut_latents_off_is_refused(tmp_path: Path) -> None:
    folder = scheduler_folder(tmp_path, clip_sample=True)
    with pytest.raises(CheckpointError, match="clip_sample"):
        make_schedule(families.find("cogvideox-fun"), folder, 4)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_a_prediction_that_means_nothing_at_pure_noise_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=kind):
        make_schedule(families.find("cogvideox-fun"), scheduler_folder(tmp_path, prediction_type=kind), 4)


def test_steps_that_do_not_begin_at_pure_noise_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = scheduler_folder(tmp_path, timestep_spacing="leading")
    with caplog.at_level(logging.WARNING):
        make_schedule(families.find("cogvideox-fun"), folder, 4)
    assert "leading" in caplog.text
