"""What operations make is counted, once, and computed once."""

from unittest import mock

import pytest
import torch

from vfun_cli import families
from vfun_cli.config.resolve import resolve
from vfun_cli.forecast.measuring import gpu
from vfun_cli.forecast.measuring.passes import measure
from vfun_cli.forecast.measuring.tracker import Tracker
from vfun_cli.forecast.request import Batch


def test_a_memory_counts_from_the_operation_that_makes_it_until_it_is_let_go() -> None:
    weight = torch.ones(10)
    with Tracker() as tracker:
        made = weight + 1
        assert tracker.bytes == 40
        part = made.view(2, 5).mul_(2)[0]
        assert tracker.bytes == 40, "a view, and a result in place"
        weight.view(5, 2).add_(1)
        assert tracker.bytes == 40, "what was there"
        torch.add(made, 1, out=weight)
        assert tracker.bytes == 40, "what was there, and named"
        more = torch._foreach_add([made, weight], 1)
        assert tracker.bytes == 120, "a list"
        del more, made
        assert tracker.bytes == 40, "a part holds the whole"
        del part
        assert (tracker.bytes, tracker.mark(), tracker.mark()) == (0, 120, 0)


def test_a_memory_that_grows_counts_as_it_is() -> None:
    with Tracker() as tracker:
        made = torch.empty(0)
        torch.add(torch.ones(5), 1, out=made)
        assert tracker.bytes == 20
        made.resize_(10)
        assert tracker.bytes == 40
        del made
        assert tracker.bytes == 0


@pytest.mark.slow
def test_a_measurement_is_the_same_whether_its_operations_are_remembered_or_not() -> None:
    spec = families.find("cogvideox-fun")
    given = {"strategy": "single", "mixed_precision": "bf16", "pretrained_model_name_or_path": "none"}
    config, batch = resolve("train", spec, given, demo={}, environ={}).config, Batch(frames=49, height=480, width=720)
    with mock.patch.object(gpu, "_makes_new", lambda operation: False):
        expected = measure(spec, config, spec.model.released, batch, lora=False)
    with mock.patch.object(gpu, "_recipes", {}) as recipes:
        assert measure(spec, config, spec.model.released, batch, lora=False) == expected
        count = len(recipes)
        assert measure(spec, config, spec.model.released, batch, lora=False) == expected
        assert len(recipes) == count > 50, "all was remembered"
