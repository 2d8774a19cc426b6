"""What counts in the loss, and what the network learns to say."""

import math

import pytest
import torch

from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.training.objectives import DDPM, FlowMatching, Objective

KEYS = [SampleKey(seed=1, epoch=0, row=row) for row in range(3)]
LATENTS = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
ALPHAS = torch.linspace(0.999, 0.01, 1000)


def test_the_target_of_flow_matching_leads_from_the_noisy_latents_to_noise_and_back() -> None:
    found = FlowMatching(shift=5.0).corrupt(LATENTS, KEYS)
    sigma = (found.timesteps / 1000).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(found.noisy - sigma * found.target, LATENTS)


@pytest.mark.parametrize("shift", [1.0, 5.0, 7.0])
def test_the_shift_moves_the_middle_of_the_schedule(shift: float) -> None:
    assert FlowMatching(shift=shift).sigmas()[500].item() == pytest.approx(shift / (shift + 1), rel=1e-6)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_the_target_of_ddpm_gives_the_latents_back(kind: str) -> None:
    found = DDPM(alphas_cumprod=ALPHAS, prediction_type=kind).corrupt(LATENTS, KEYS)
    alpha = ALPHAS[found.timesteps].view(-1, 1, 1, 1, 1)
    signal, amount = alpha.sqrt(), (1 - alpha).sqrt()
    if kind == "v_prediction":
        latents = signal * found.noisy - amount * found.target
    else:
        latents = (found.noisy - amount * found.target) / signal
    torch.testing.assert_close(latents, LATENTS, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (FlowMatching(shift=1.0), 0.75),
        (DDPM(alphas_cumprod=ALPHAS, prediction_type="v_prediction", outlier=50.0), 0.75),
        (DDPM(alphas_cumprod=ALPHAS, prediction_type="v_prediction"), (3 + 100**2) / 4),
    ],
)
def test_outliers_count_as_zero_where_the_family_has_them(objective: Objective, expected: float) -> None:
    target = torch.zeros(1, 1, 1, 2, 2)
    prediction = torch.tensor([1.0, 1.0, 1.0, 100.0]).view(1, 1, 1, 2, 2)
    assert objective.loss(prediction, target, None).item() == pytest.approx(expected)


def test_what_is_no_number_stays_none_and_masked_elements_do_not_count() -> None:
    target = torch.zeros(1, 1, 2, 1, 1)
    assert math.isnan(FlowMatching(shift=1.0).loss(target + math.nan, target, None).item())
    prediction, mask = torch.tensor([3.0, 1.0]).view(1, 1, 2, 1, 1), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    assert FlowMatching(shift=1.0).loss(prediction, target, mask).item() == 1.0


BOTH: list[Objective] = [FlowMatching(shift=5.0), DDPM(alphas_cumprod=ALPHAS, prediction_type="v_prediction")]


@pytest.mark.parametrize("objective", BOTH)
def test_a_quantile_of_the_timesteps_has_that_share_of_them_below(objective: Objective) -> None:
    """Timesteps grow with the noise, in either order of the schedule."""
    every = objective.corrupt_at(LATENTS[:1].expand(1000, -1, -1, -1, -1), [KEYS[0]] * 1000, range(1000)).timesteps
    for quantile in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        here = objective.corrupt_at(LATENTS[:1], KEYS[:1], [objective.at_quantile(quantile)]).timesteps
        assert (every <= here).double().mean().item() == pytest.approx(quantile)


@pytest.mark.parametrize("objective", BOTH)
def test_at_the_timesteps_that_the_keys_draw_it_is_the_training(objective: Objective) -> None:
    drawn = [int(key.numpy("timestep").integers(1000)) for key in KEYS]
    assert len(set(drawn)) == 3
    trained, at = objective.corrupt(LATENTS, KEYS), objective.corrupt_at(LATENTS, KEYS, drawn)
    assert all(torch.equal(value, vars(at)[name]) for name, value in vars(trained).items())
    elsewhere = objective.corrupt_at(LATENTS, KEYS, [1, 2, 3])
    assert not torch.equal(elsewhere.noisy, trained.noisy)
