"""Adapters: which layers get them, what they start from, what a checkpoint holds of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lora_sample import GOLDEN, TARGETS, load_model, model_directory, options, predict, prepared, train, with_adapters
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from vfun_cli.config.network import check_network
from vfun_cli.config.options import BASE_PRECISIONS, parse
from vfun_cli.config.resolve import resolve
from vfun_cli.errors import CheckpointError, ConfigError, EnvironmentFault
from vfun_cli.families import FAMILIES
from vfun_cli.families.cogvideox_fun import SPEC
from vfun_cli.families.wan_fun_control.names import released_name
from vfun_cli.training.lora import add_adapters, choose_layers, load_adapter, load_network, save_adapter
from vfun_cli.training.quantised import QuantisedLinear, levels_of, quantise_layers
from vfun_cli.training.state.live import TrainedState

FILES = {
    "lora_peft/checkpoint-1.safetensors": "lora_peft",
    "lora_peft/checkpoint-1-compatible_with_comfyui.safetensors": "lora_peft",
    "lora_kohya/checkpoint-1.safetensors": "lora_kohya",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "model")


@pytest.fixture(autouse=True)
def _alone() -> None:
    """One thread, and no accelerator of an earlier test."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(family: str, **given: Any) -> dict[str, Any]:
    return vars(resolve("lora", FAMILIES[family], {"device": "cpu", **given}, environ={}).config)


# existing files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_files_of_the_original_start_a_run_with_their_predictions(file: str, base: Path) -> None:
    config = options(target_name=("to_q", "to_k", "to_v"))
    model = with_adapters(base, config)
    load_network(model, GOLDEN / file, config, SPEC, SPEC.model.dims)
    expected = load_file(GOLDEN / FILES[file] / "io.safetensors")["pred"]
    torch.testing.assert_close(predict(model), expected, atol=1e-5, rtol=0)
    assert (predict(load_model(base)) - expected).abs().max() > 1e-3  # the adapter matters


def test_a_file_of_another_strength_starts_with_the_same_predictions(base: Path) -> None:
    config = options(target_name=("to_q", "to_k", "to_v"), network_alpha=4.0)
    model = with_adapters(base, config)
    load_network(model, GOLDEN / "lora_kohya/checkpoint-1.safetensors", config, SPEC, SPEC.model.dims)
    expected = load_file(GOLDEN / "lora_kohya/io.safetensors")["pred"]
    torch.testing.assert_close(predict(model), expected, atol=1e-5, rtol=0)


def test_layers_the_file_does_not_hold_start_fresh(base: Path) -> None:
    config = options()
    model = with_adapters(base, config)
    load_network(model, GOLDEN / "lora_kohya/checkpoint-1.safetensors", config, SPEC, SPEC.model.dims)
    expected = load_file(GOLDEN / "lora_kohya/io.safetensors")["pred"]
    torch.testing.assert_close(predict(model), expected, atol=1e-5, rtol=0)


def test_a_file_with_layers_that_are_not_trained_is_refused(base: Path) -> None:
    config = options(target_name=("to_q",))
    with pytest.raises(ConfigError, match=r"4 layers that --target-name leaves out") as caught:
        load_network(
            with_adapters(base, config), GOLDEN / "lora_kohya/checkpoint-1.safetensors", config, SPEC, SPEC.model.dims
        )
    assert caught.value.hint is not None and "to_" in caught.value.hint


def test_a_file_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    stored = load_file(GOLDEN / "lora_peft/checkpoint-1.safetensors")
    save_file({f"double_{name}": value for name, value in stored.items()}, tmp_path / "other.safetensors")
    config = options()
    with pytest.raises(CheckpointError, match="6 of 6 adapters are for layers that this model does not have"):
        load_network(with_adapters(base, config), tmp_path / "other.safetensors", config, SPEC, SPEC.model.dims)


def test_adapters_of_layers_without_effect_are_left_out_with_a_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.add_q_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    model = nn.ModuleDict({"transformer_blocks": nn.ModuleList([Block(), Block()])})
    without = replace(SPEC.model, modules_without_gradient=lambda dims: ("transformer_blocks.1.add_q_proj",))
    spec = replace(SPEC, model=without)
    config = options(rank=2, network_alpha=2.0, target_name=("to_q", "add_q_proj"))
    add_adapters(model, config, spec, spec.model.dims)
    layers = [f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in ("to_q", "add_q_proj")]
    stored = {
        f"transformer.{layer}.lora_{side}.weight": torch.ones(shape)
        for layer in layers
        for side, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    save_file(stored, tmp_path / "all.safetensors")
    load_network(model, tmp_path / "all.safetensors", config, spec, spec.model.dims)
    assert "1 layers without any effect in this model, e.g. transformer_blocks.1.add_q_proj" in capsys.readouterr().err
    loaded = {name for name, value in model.named_parameters() if ".lora_B." in name and (value == 1).all()}
    assert loaded == {f"{layer}.lora_B.default.weight" for layer in layers[:3]}


def test_rank_and_strength_of_a_file_are_told_before_the_launch(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(file: Path, **given: Any) -> str:
        check_network(file, options(pretrained_model_name_or_path=base.parent, **given), SPEC)
        return " ".join(capsys.readouterr().err.split())

    kohya, peft = (GOLDEN / f"lora_{style}/checkpoint-1.safetensors" for style in ("kohya", "peft"))
    with pytest.raises(ConfigError, match="has rank 4, this run has rank 8") as caught:
        check(kohya, rank=8)
    assert caught.value.hint == "Add --rank 4."
    with pytest.raises(ConfigError, match="is no DoRA"):
        check(kohya, use_dora=True)
    assert "taken for a file of the original scripts: strength 0.5, as its alphas state" in check(kohya)
    assert "this run has strength 1: the B matrices" in check(kohya, network_alpha=4.0)
    assert "states no alpha: taken to be of this run's strength, 0.5" in check(peft)


def test_all_that_does_not_fit_is_told_before_the_launch_with_what_to_type(base: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_network(
            GOLDEN / "lora_kohya/checkpoint-1.safetensors",
            options(pretrained_model_name_or_path=base.parent, target_name=("to_q",), rank=8),
            SPEC,
        )
    assert "4 layers that --target-name leaves out: " in caught.value.message
    assert "transformer_blocks.0-1.attn1.to_k, transformer_blocks.0-1.attn1.to_v" in caught.value.message
    assert "rank 4, this run has rank 8" in caught.value.message
    assert caught.value.hint == "Add --target-name to_q,to_k,to_v --rank 4."


# targets -------------------------------------------------------------------------------------------------------------


def test_the_documents_spelling_of_the_feed_forward_is_translated(capsys: pytest.CaptureFixture[str]) -> None:
    translated = settings("cogvideox-fun", target_name="to_q,to_k,to_v,ff.0,ff.2")["target_name"]
    assert translated == TARGETS
    assert "ff.0 -> ff.net.0.proj, ff.2 -> ff.net.2" in capsys.readouterr().err
    assert settings("cogvideox-fun")["target_name"] == TARGETS
    assert capsys.readouterr().err == ""


def test_a_target_that_matches_nothing_names_near_misses(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"'to_qq' is the ending of no linear layer.*Near misses: .*to_q"):
        with_adapters(base, options(target_name=("to_k", "to_qq")))
    with pytest.raises(ConfigError, match=r"'attn1' is the ending of no linear layer.*attn1\.to_q"):
        with_adapters(base, options(target_name=("attn1",)))


def test_released_names_choose_the_layers_that_they_name() -> None:
    linear = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn2.add_k_proj", "blocks.0.ffn.net.0.proj"]
    assert choose_layers(linear, ("q", "k", "ffn.0"), released_name) == [linear[0], linear[1], linear[3]]
    assert choose_layers(linear, ("cross_attn.k_img",), released_name) == [linear[2]]


def test_layers_without_a_gradient_get_no_adapter() -> None:
    linear = ["blocks.0.to_q", "blocks.1.to_q", "blocks.10.to_q"]
    assert choose_layers(linear, ("to_q",), str, ("blocks.1",)) == ["blocks.0.to_q", "blocks.10.to_q"]
    with pytest.raises(ConfigError, match="none of the chosen layers ever gets a gradient"):
        choose_layers(linear, ("to_q",), str, ("blocks",))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_targets_of_its_own(family: str) -> None:
    own = settings(family)
    assert len(own["target_name"]) >= 5
    assert (own["rank"], own["network_alpha"]) == (64, 32)


# options -------------------------------------------------------------------------------------------------------------


def test_what_lora_cannot_do_is_refused_before_the_launch() -> None:
    with pytest.raises(ConfigError, match="target_name is empty"):
        settings("wan-s2v", target_name="")
    with pytest.raises(ConfigError, match="LoRA trains adapters only"):
        settings("wan-s2v", trainable_modules="self_attn")
    with pytest.raises(ConfigError, match="use_dora needs a layer's whole weight"):
        settings("wan-s2v", use_dora=True, strategy="zero3")
    with pytest.raises(ConfigError, match=r"network-alpha is 0\.0, it must be more"):
        settings("wan-s2v", network_alpha=0)
    with pytest.raises(ConfigError, match="must be less than 1"):
        settings("wan-s2v", lora_dropout=1.0)
    for strategy in ("fsdp", "zero2", "zero3", "zero3-offload"):
        with pytest.raises(ConfigError, match=f"stream_blocks with strategy {strategy}"):
            settings("wan-s2v", stream_blocks=0, strategy=strategy)
    with pytest.raises(ConfigError, match="compile and stream_blocks cannot be combined"):
        settings("wan-s2v", stream_blocks=0, compile=True)
    assert parse("base_precision", "bf16", "") == "bf16"
    for precision in BASE_PRECISIONS[1:]:
        with pytest.raises(EnvironmentFault, match=f"base_precision {precision} needs a GPU"):
            settings("wan-s2v", base_precision=precision)


# training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}, {"mixed_precision": "bf16"}])
def test_only_adapters_change_and_every_one_of_them(kind: dict[str, Any], base: Path) -> None:
    config = options(**kind)
    model = with_adapters(base, config)
    state = prepared(model, config, Accelerator(cpu=True))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    frozen = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    losses = train(state, 8, frozen)
    after = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    adapters = {name for name in after if ".lora_" in name}
    assert changed == adapters
    assert len(adapters) == 10 * (3 if config.use_dora else 2)
    assert {after[name].dtype for name in adapters} == {torch.float32}
    assert {value.dtype for name, value in after.items() if name not in adapters} == {frozen}
    assert losses[-1] < losses[0]


def test_the_first_a_depends_on_the_seed_alone(base: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        torch.rand(seed)  # loading a model draws, too
        return with_adapters(base, options(seed=seed)).get_parameter(f"{layer}.lora_A.default.weight")

    layer = "transformer_blocks.0.attn1.to_q"
    torch.manual_seed(123)
    one = first(7)
    assert torch.equal(one, first(7))
    assert not torch.equal(one, first(8))


def test_a_checkpoint_holds_adapter_and_optimizer_only(tmp_path: Path) -> None:
    model = nn.ModuleDict({"wide": nn.Linear(512, 2048), "narrow": nn.Linear(2048, 512)})
    config = options(rank=64, target_name=("wide", "narrow"))
    add_adapters(model, config, SPEC, SPEC.model.dims)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=False)
    state = TrainedState(accelerator=accelerator, model=model, optimizer=optimizer)
    model["narrow"](model["wide"](torch.rand(2, 512))).sum().backward()
    optimizer.step()
    save_adapter(state, tmp_path)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 12 * count < total < 12 * count * 1.01


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}])
def test_a_restored_state_trains_on_to_the_same_bits(kind: dict[str, Any], base: Path, tmp_path: Path) -> None:
    config = options(**kind)
    whole = prepared(with_adapters(base, config), config, Accelerator(cpu=True))
    train(whole, 2)
    save_adapter(whole, tmp_path)
    expected = train(whole, 2)
    again = prepared(with_adapters(base, config), config, Accelerator(cpu=True))
    load_adapter(again, tmp_path)
    assert train(again, 2) == expected
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, again.model.get_parameter(name)), name


def test_other_adapters_than_the_runs_are_refused(base: Path, tmp_path: Path) -> None:
    config = options(target_name=("to_q",))
    state = prepared(with_adapters(base, config), config, Accelerator(cpu=True))
    save_adapter(state, tmp_path)
    other = options(target_name=("to_q", "to_k"))
    state = prepared(with_adapters(base, other), other, Accelerator(cpu=True))
    with pytest.raises(CheckpointError, match=r"4 differ, e\.g\. .*to_k"):
        load_adapter(state, tmp_path)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_peft_loads_a_checkpoint_as_it_lies(kind: dict[str, Any], base: Path, tmp_path: Path) -> None:
    config = options(**kind)
    state = prepared(with_adapters(base, config), config, Accelerator(cpu=True))
    train(state, 3)
    save_adapter(state, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 2
    loaded = PeftModel.from_pretrained(load_model(base), str(tmp_path))
    torch.testing.assert_close(predict(loaded.base_model.model), predict(state.model), atol=1e-6, rtol=0)


# quantised base ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "error", "bits"), [("fp8", 0.04, 8), ("nf4", 0.12, 4)])
def test_a_quantised_layer_is_near_its_original_and_passes_gradients(precision: str, error: float, bits: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(200, 120).requires_grad_(False)
    layer = QuantisedLinear(linear, precision, levels_of(precision, torch.device("cpu")))
    x = torch.randn(7, 200, requires_grad=True)
    relative = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert 0 < relative < error
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight_as(torch.float32).sum(0).expand(7, -1))
    assert layer.codes.numel() * 8 == pytest.approx(linear.weight.numel() * bits, rel=0.01)


def test_a_quantised_base_trains_its_adapters(base: Path) -> None:
    config = options(mixed_precision="bf16")
    model = with_adapters(base, config)
    assert quantise_layers(model, "nf4", torch.device("cpu")) > 10
    kept = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target = load_file(GOLDEN / "2b_native/io.safetensors")["target"]
    losses = []
    for _ in range(6):
        loss = (predict(model) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in kept.items())
