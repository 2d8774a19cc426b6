"""What counts in the loss, and what the network learns to say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from vfun_cli.config.options import options
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.training.objectives import DDPM, FlowMatching, Objective
from vfun_cli.training.variant import Variant

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
    for name in ("noisy", "timesteps", "target"):
        assert torch.equal(vars(trained)[name], vars(at)[name])
    assert trained.weights is None and at.weights is None
    elsewhere = objective.corrupt_at(LATENTS, KEYS, [1, 2, 3])
    assert not torch.equal(elsewhere.noisy, trained.noisy)


SCHEMES = options()["weighting_scheme"][2].choices
DENSITIES = [
    {"weighting_scheme": "logit_normal"},
    {"weighting_scheme": "logit_normal", "logit_mean": -0.5, "logit_std": 1.7},
    {"weighting_scheme": "logit_normal", "logit_mean": 1.0, "logit_std": 0.3},
    {"weighting_scheme": "mode"},
    {"weighting_scheme": "mode", "mode_scale": -1.0},
    {"weighting_scheme": "mode", "mode_scale": 1.75},
]
OTHERS = [{"weighting_scheme": scheme} for scheme in SCHEMES if scheme not in ("logit_normal", "mode")]
DEFAULTS = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}


@dataclass(frozen=True)
class Row:
    """What a row's key has drawn for its timestep; its noise is none."""

    uniform: int
    dense: float

    def numpy(self, purpose: str) -> Any:
        return SimpleNamespace(integers=lambda end: self.uniform, random=lambda: self.dense)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(()).expand(shape)


def drawn_by(rows: int) -> list[Row]:
    keys = (SampleKey(seed=5, epoch=0, row=row) for row in range(rows))
    return [
        Row(uniform=int(key.numpy("timestep").integers(1000)), dense=float(key.numpy("timestep-density").random()))
        for key in keys
    ]


@pytest.fixture(scope="module")
def many_rows() -> list[Row]:
    return drawn_by(100_000)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return drawn_by(4_000)


def places(asked: dict[str, Any], keys: Sequence[Any]) -> Tensor:
    """Where in the schedule these rows train; without a shift the timesteps tell it."""
    objective = FlowMatching(shift=1.0, variant=Variant(**asked))
    found = objective.corrupt(torch.zeros(1, 1, 1, 1, 1).expand(len(keys), -1, -1, -1, -1), keys).timesteps
    return (1000 - found).round().long()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [*DENSITIES, *OTHERS], ids=str)
def test_timesteps_are_as_dense_as_in_diffusers(asked: dict[str, Any], many_rows: list[Row]) -> None:
    """Kolmogorov and Smirnov's distance of the places of 10^5 draws from those of the originals."""
    found = places(asked, many_rows)
    theirs = compute_density_for_timestep_sampling(
        **{**DEFAULTS, **asked}, batch_size=len(found), generator=torch.Generator().manual_seed(0)
    )
    their_places = (theirs * 1000).long().clamp(max=999)  # a draw of theirs may end past the schedule
    shares = [torch.bincount(each, minlength=1000).cumsum(0) / len(each) for each in (found, their_places)]
    assert (shares[0] - shares[1]).abs().max() < 0.01
    if asked in OTHERS:
        assert found.tolist() == [row.uniform for row in many_rows], "the draws of before, not only as dense"


@pytest.mark.parametrize("asked", DENSITIES, ids=str)
def test_a_quantile_of_a_density_has_that_share_of_the_draws_below(asked: dict[str, Any], rows: list[Row]) -> None:
    """Timesteps grow with the noise."""
    objective, found = FlowMatching(shift=5.0, variant=Variant(**asked)), places(asked, rows)
    at = [objective.at_quantile(tenth / 10) for tenth in range(1, 10)]
    assert at == sorted(at, reverse=True) and len(set(at)) == 9
    for tenth, place in enumerate(at, start=1):
        assert (found >= place).double().mean().item() == pytest.approx(tenth / 10, abs=0.03)


@settings(max_examples=60)
@given(
    asked=st.fixed_dictionaries({
        "weighting_scheme": st.sampled_from(SCHEMES), "logit_mean": st.floats(-10, 10),
        "logit_std": st.floats(0.01, 10), "mode_scale": st.floats(-1, 1.75),
        "noise_share_in_frames_ratio": st.floats(0, 1),
    }),
    rows=st.lists(st.integers(0, 10**6), min_size=2, max_size=5),
    ranks=st.integers(2, 3),
)  # fmt: skip
def test_what_a_sample_draws_and_weighs_is_its_own_whatever_the_ranks(
    asked: dict[str, Any], rows: list[int], ranks: int
) -> None:
    objective = FlowMatching(shift=3.0, variant=Variant(**asked))
    keys = [SampleKey(seed=2, epoch=1, row=row) for row in rows]
    latents = torch.stack([key.normal("latents", (2, 3, 2, 2)) for key in keys])
    together = objective.corrupt(latents, keys)
    for rank in range(ranks):
        mine = list(range(rank, len(rows), ranks))
        if mine:
            alone = objective.corrupt(latents[mine], [keys[place] for place in mine])
            for name, value in vars(together).items():
                found = vars(alone)[name]
                assert found is None if value is None else torch.equal(found, value[mine]), name


@pytest.mark.parametrize("shift", [1.0, 7.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_those_of_diffusers(scheme: str, shift: float, rows: list[Row]) -> None:
    objective = FlowMatching(shift=shift, variant=Variant(weighting_scheme=scheme))
    keys: Sequence[Any] = rows[:1000]
    found = objective.corrupt_at(torch.zeros(1000, 1, 1, 1, 1), keys, range(1000)).weights
    theirs = compute_loss_weighting_for_sd3(scheme, objective.sigmas())
    assert torch.equal(theirs if found is None else found, theirs)
    assert (found is not None) == (scheme in ("sigma_sqrt", "cosmap"))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
def test_each_sample_of_a_micro_batch_counts_by_its_weight(masked: bool) -> None:
    """An outlier counts as nothing before it is weighed; what is masked does not count, weighed or not."""
    prediction, target, weights = drawn(3, 2, 4, 5, 5, seed=1), drawn(3, 2, 4, 5, 5, seed=2), drawn(3, seed=3).exp()
    prediction[0, 0, 3, 0, 0] = 1000
    mask = torch.ones(3, 1, 4, 1, 1)
    mask[:, :, 0] = 0
    errors = (prediction - target).square().double()
    errors[0, 0, 3, 0, 0] = 0
    counted = errors[:, :, 1:] if masked else errors
    expected = (counted.flatten(1).mean(dim=1) * weights).mean()
    found = FlowMatching(shift=3.0).loss(prediction, target, mask if masked else None, weights)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 6])
@pytest.mark.parametrize("objective", BOTH)
def test_the_motion_error_is_that_of_what_changes_between_frames(objective: Any, frames: int, masked: bool) -> None:
    """As the originals compute it, without outliers and weights, and not of one or two latent frames."""
    prediction, target, weights = (
        drawn(3, 2, frames, 4, 4, seed=1),
        drawn(3, 2, frames, 4, 4, seed=2),
        torch.ones(3) / 3,
    )
    prediction[0, 0, -1, 0, 0] = 80
    mask = torch.ones(3, 1, frames, 1, 1)
    mask[:, :, 0] = 0
    given_mask = mask if masked else None
    first = 1 if masked else 0
    changes = [each[:, :, first + 1 :] - each[:, :, first:-1] for each in (prediction, target)]
    plain = objective.loss(prediction, target, given_mask, weights)
    found = replace(objective, variant=Variant(motion_sub_loss_ratio=0.25)).loss(
        prediction, target, given_mask, weights
    )
    if frames <= 2:
        assert torch.equal(found, plain)
        return
    expected = 0.75 * plain + 0.25 * functional.mse_loss(*changes)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", [FlowMatching(shift=5.0), DDPM(alphas_cumprod=ALPHAS, prediction_type="epsilon")])
def test_frames_share_noise_of_unit_variance(kind: Any, ratio: float) -> None:
    """The mixture of the original, frame by frame, at the variance that the timestep tells the model."""
    latents, asked = torch.zeros(1, 16, 7, 32, 32), Variant(noise_share_in_frames_ratio=ratio)
    white, found = (
        objective.corrupt(latents, KEYS[:1]).target[0].unbind(1) for objective in (kind, replace(kind, variant=asked))
    )
    mixed = white[0]
    for own, frame in zip(white, found, strict=True):
        mixed = ratio * mixed + (1 - ratio) * own if own is not white[0] else own
        assert torch.corrcoef(torch.stack([mixed.flatten(), frame.flatten()]))[0, 1].item() == pytest.approx(1)
        assert frame.var().item() == pytest.approx(1, abs=0.05) and abs(frame.mean().item()) < 0.05
        assert ratio or torch.equal(frame, own)


@pytest.mark.parametrize("objective", BOTH)
def test_what_a_run_asks_for_is_not_in_the_plain_objective(objective: Any) -> None:
    asked = Variant(weighting_scheme="cosmap", motion_sub_loss_ratio=0.5, noise_share_in_frames_ratio=0.5)
    assert replace(objective, variant=asked).plain() == objective
