"""The moving average of the weights follows diffusers' from the first step on, and changes places with them."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from vfun_cli.training.state import ema
from vfun_cli.training.state.ema import WeightAverage


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_the_average_is_that_of_diffusers(decay: float) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    theirs, ours = EMAModel([weight], decay=decay), WeightAverage([weight], decay)
    for step in range(200):
        with torch.no_grad():
            weight += torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        theirs.step([weight])
        ours.update([weight], step)
        torch.testing.assert_close(ours.shadow[0], theirs.shadow_params[0], atol=1e-5, rtol=0)


def test_average_and_masters_change_places_to_the_bit_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema, "EXCHANGED", 4)  # so that a tensor goes in several pieces, the last one shorter
    whole = torch.randn(3, 5)
    padded = torch.randn(4, 5)
    masters = [torch.nn.Parameter(torch.randn(7)), whole[:0], padded[:3]]  # FSDP's shards may be empty, or in padding
    average = WeightAverage(masters, 0.9)
    for shadow in average.shadow:
        shadow += 1
    before = [master.detach().clone() for master in masters], [shadow.clone() for shadow in average.shadow]
    places = [tensor.data_ptr() for tensor in (*masters, *average.shadow)]
    average.exchange(masters)
    for master, shadow, weight, mean in zip(masters, average.shadow, *before, strict=True):
        assert torch.equal(master, mean) and torch.equal(shadow, weight)
    average.exchange(masters)
    for master, shadow, weight, mean in zip(masters, average.shadow, *before, strict=True):
        assert torch.equal(master, weight) and torch.equal(shadow, mean)
    assert places == [tensor.data_ptr() for tensor in (*masters, *average.shadow)]


def test_an_average_takes_the_memory_of_the_masters_and_no_more() -> None:
    flat = torch.zeros(1000)
    average = WeightAverage([flat[100:200].view(10, 10)], 0.9)
    assert [shadow.untyped_storage().nbytes() for shadow in average.shadow] == [400]
