"""--optimizer and what goes with it, before a launch: what is taken, refused and said."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.commands.conftest import TRAIN, Vfun
from vfun_cli import devices, imports
from vfun_cli.config import optimizers
from vfun_cli.config.optimizers import OPTIMIZERS
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError, EnvironmentFault

DRY = "--dry-run"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All optional packages, as far as a launch looks for them."""
    monkeypatch.setattr(devices, "find_spec", lambda name: SimpleNamespace())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ([], {}),
        (["betas=(0.9,0.95),eps=1e-8", "amsgrad=True"], {"betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": True}),
        (["eps = (None, 1e-3)"], {"eps": (None, 1e-3)}),
        (["nesterov=false,foreach=none,ns_steps=6"], {"nesterov": False, "foreach": None, "ns_steps": 6}),
        (["growth_rate=inf", "adjust_lr_fn=original"], {"growth_rate": math.inf, "adjust_lr_fn": "original"}),
    ],
)
def test_arguments_are_numbers_words_and_tuples(typed: list[str], meant: dict[str, Any]) -> None:
    found = optimizers.parse_arguments(typed)
    assert found == meant and [type(value) for value in found.values()] == [type(value) for value in meant.values()]


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        (["--optimizer", "adam8bit"], 2, "no optimizer 'adam8bit'. Did you mean 'adamw8bit'?"),
        (["--optimizer", "os.path.join("], 2, "no optimizer"),
        (["--optimizer", "nowhere_at_all.Lion"], 6, "no package nowhere_at_all is installed"),
        (["--optimizer", "muon", "--optimizer-args", "momentun=0.9"], 2, "no momentun. Did you mean 'momentum'?"),
        (["--optimizer", "muon", "--optimizer-args", "lr=1"], 2, "--learning-rate"),
        (["--optimizer", "muon", "--optimizer-args", "momentum"], 2, "'momentum' is not name=value"),
        (["--optimizer-args", "amsgrad=1,amsgrad=0"], 2, "amsgrad is given twice"),
        (["--optimizer", "came", "--fsdp"], 2, "came cannot work under strategy fsdp: it needs whole matrices"),
        (["--optimizer", "muon", "--zero3"], 2, "Use --ddp, or --optimizer adamw"),
        (["--optimizer", "adamw8bit", "--zero2"], 2, "Use --ddp or --fsdp"),
        (["--optimizer", "prodigy", "--fsdp"], 2, "one rate from all weights"),
        (["--optimizer", "prodigy", "--trainable_modules_low_learning_rate", "patch"], 2, "one learning rate"),
        (["--use_8bit_adam", "--use_came"], 2, "more than one optimizer was asked for: adamw8bit, came"),
        (["--lr-power", "2"], 2, "no effect on lr_scheduler constant"),
        (["--lr-min-ratio", "0.1", "--lr-scheduler", "constant_with_warmup"], 2, "no effect on lr_scheduler"),
        (["--trainable_modules_low_learning_rate", "nothing_like_it"], 2, "'nothing_like_it' is in no parameter name"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_way_out(
    typed: list[str], code: int, said: str, place: Path, vfun: Vfun
) -> None:
    found = vfun(*TRAIN, *typed, DRY)
    assert found.code == code and said in " ".join(found.err.split()), found.err


def test_adapters_have_one_learning_rate(place: Path, vfun: Vfun) -> None:
    found = vfun("lora", "wan-s2v", "--demo", "--trainable-modules-low-learning-rate", "head", DRY)
    assert found.code == 2 and "at one rate" in found.err


@pytest.mark.parametrize(
    ("typed", "optimizer"),
    [
        ([], "adamw"),
        (["--use_8bit_adam"], "adamw8bit"),
        (["--use_came"], "came"),
        (["--use_came", "--optimizer", "came"], "came"),
        (["--optimizer", "torch.optim.RAdam", "--fsdp"], "torch.optim.RAdam"),
        (["--optimizer", "adamw8bit", "--fsdp"], "adamw8bit"),
    ],
)
def test_flags_of_the_original_scripts_name_an_optimizer(
    typed: list[str], optimizer: str, place: Path, vfun: Vfun
) -> None:
    found = vfun(*TRAIN, *typed, DRY, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["config"]["optimizer"] == optimizer


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--optimizer", "adamw", "--adam-beta1", "0.8"], None),
        (["--optimizer", "came"], None),
        (["--optimizer", "came", "--adam-beta1", "0.8"], "without effect on came: adam_beta1."),
        (["--optimizer", "muon", "--adam-beta1", "0.8"], None),
        (["--optimizer", "adafactor", "--learning-rate", "2e-5"], "0.01 is usual, and 2e-05 may"),
        (["--optimizer", "prodigy"], "a factor on the rate that it finds by itself: 1 is usual"),
        (["--optimizer", "prodigy", "--learning-rate", "1"], None),
        (["--optimizer", "torch.optim.SGD", "--adam-epsilon", "1e-6"], "effect on torch.optim.SGD: adam_epsilon."),
        (["--optimizer", "torch.optim.RAdam", "--zero2"], "each number is a matter of its own"),
    ],
)  # fmt: skip
def test_what_has_no_or_another_effect_is_said(typed: list[str], said: str | None, place: Path, vfun: Vfun) -> None:
    found = vfun(*TRAIN, *typed, DRY)
    assert found.code == 0, found.err
    words = " ".join(found.err.split())
    assert said in words if said else "without effect" not in words and "usual" not in words


@pytest.mark.parametrize("name", [name for name, each in OPTIMIZERS.items() if each.package])
def test_a_missing_package_is_named_with_its_installation(
    name: str, place: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda module: None if module == OPTIMIZERS[name].module else module)
    found = vfun(*TRAIN, "--optimizer", name, DRY)
    assert found.code == 6 and f"pip install {OPTIMIZERS[name].package}" in found.err


def test_a_module_of_the_working_directory_is_never_run(
    place: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "lying_around.py").write_text("open('ran', 'w')\nclass Lion: pass\n")
    (place / "prodigyopt.py").write_text("open('ran', 'w')\n")
    monkeypatch.syspath_prepend(place)
    found = vfun(*TRAIN, "--optimizer", "lying_around.Lion", DRY)
    assert found.code == 6 and "no package lying_around is installed" in " ".join(found.err.split())
    with pytest.raises(EnvironmentFault, match="no package lying_around"):
        imports.named_installed("lying_around:Lion", "--optimizer")
    assert not (place / "ran").exists()


def test_a_module_that_comes_before_an_installed_one_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hypothesis.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "hypothesis", raising=False)
    with pytest.raises(EnvironmentFault, match=r"hypothesis\.py comes before the installed"):
        imports.named_installed("hypothesis:given", "--optimizer")
    assert not (tmp_path / "ran").exists()


def test_a_name_that_the_package_lacks_is_no_fault_of_ours() -> None:
    with pytest.raises(ConfigError, match=r"torch\.optim\.Lion cannot be imported"):
        imports.named_installed("torch.optim:Lion", "--optimizer")


WAN_S2V = [(5120, 5120)] * 160 + [(13824, 5120), (5120, 13824)] * 40 + [(5120,)] * 400
"""Most of its parameters."""


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("adamw", 8, 8.01),
        ("adamw8bit", 2, 2.1),
        ("adafactor", 0, 0.01),
        ("came", 4, 4.01),
        ("prodigy", 16, 16.01),
        ("muon", 4, 4.01),
    ],
)
def test_so_many_bytes_a_parameter_are_kept(name: str, least: float, most: float) -> None:
    config = RunConfig(optimizer=name)
    count = sum(map(math.prod, WAN_S2V))
    for ranks in (1, 8):
        assert least <= optimizers.state_bytes(config, WAN_S2V, ranks=ranks) / count <= most


def test_shards_too_small_for_8_bits_are_counted_as_they_are_kept() -> None:
    config = RunConfig(optimizer="adamw8bit")
    whole, halves = (optimizers.state_bytes(config, [(64, 64)], ranks=ranks) for ranks in (1, 2))
    assert (whole, halves) == (2 * (4096 + 4 * 16) + 4, 2 * 4 * 4096 + 2 * 4)
