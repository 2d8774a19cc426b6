"""The moving average of the weights follows diffusers' from the first step on."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from vfun_cli.training.state.ema import WeightAverage


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_the_average_is_that_of_diffusers(decay: float) -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    theirs, ours = EMAModel([layer.weight], decay=decay), WeightAverage(layer, decay)
    assert list(ours.shadow) == ["weight"]
    for step in range(200):
        with torch.no_grad():
            layer.weight += torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        theirs.step([layer.weight])
        ours.update(layer, step)
        torch.testing.assert_close(ours.shadow["weight"], theirs.shadow_params[0], atol=1e-5, rtol=0)


def test_an_average_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one() -> None:
    layer = nn.Linear(3, 2)
    whole, first = WeightAverage(layer, 0.99), WeightAverage(layer, 0.99)
    second = WeightAverage(layer, 0.99)
    for step in range(20):
        with torch.no_grad():
            layer.weight += 1
        whole.update(layer, step)
        if step == 10:
            second.load({name: tensor.clone() for name, tensor in first.shadow.items()})
        (first if step < 10 else second).update(layer, step)
    assert torch.equal(whole.shadow["weight"], second.shadow["weight"])
