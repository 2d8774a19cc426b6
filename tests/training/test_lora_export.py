"""Trained adapters in every format, read back by the real loaders: the same prediction, at the trained strength."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, HunyuanVideoPipeline, WanPipeline
from lora_sample import TARGETS, load_model, model_directory, options, predict, prepared, train, with_adapters
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.jobs import Said, vfun_here
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.lora_export import FORMATS, export_adapter, merge_adapter
from vfun_cli.checkpoints.lora_files import read_adapter
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families.cogvideox_fun import SPEC
from vfun_cli.families.cogvideox_fun.transformer import CogVideoXFunTransformer
from vfun_cli.families.hunyuanvideo.comfyui import comfyui_location
from vfun_cli.families.spec import ModelDims
from vfun_cli.families.wan_fun_control.names import released_name
from vfun_cli.training.lora import load_network, save_adapter

KINDS: dict[str, dict[str, Any]] = {
    "half": {},  # as rank 64 with alpha 32
    "double": {"network_alpha": 8.0},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


class Trained:
    """A LoRA checkpoint, its base, and what the live model predicts."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier test
        self.config = config
        self.base = model_directory(folder / "model")
        state = prepared(with_adapters(self.base, config), config, Accelerator(cpu=True))
        train(state, 6)
        self.checkpoint = folder / "checkpoint-6"
        (self.checkpoint / "model").mkdir(parents=True)
        save_adapter(state, self.checkpoint / "model")
        self.prediction = predict(state.model).detach()
        assert (self.prediction - predict(load_model(self.base))).abs().max() > 0.05  # or nothing is compared


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), options(**KINDS[request.param]))


@pytest.fixture
def plain(tmp_path: Path) -> Trained:
    return Trained(tmp_path, options())


def through_peft(trained: Trained, folder: Path) -> torch.nn.Module:
    loaded: torch.nn.Module = PeftModel.from_pretrained(load_model(trained.base), str(folder)).base_model.model
    return loaded


def through_the_transformer(trained: Trained, folder: Path) -> torch.nn.Module:
    model = load_model(trained.base)
    model.load_lora_adapter(load_file(folder / "pytorch_lora_weights.safetensors"), prefix="transformer")
    return model


def through_the_pipeline(trained: Trained, folder: Path) -> torch.nn.Module:
    model = load_model(trained.base)
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=CogVideoXDDIMScheduler()
    )
    pipeline.load_lora_weights(str(folder))
    return model


def through_training_on(trained: Trained, folder: Path) -> torch.nn.Module:
    """Our own reader, in a run of another strength."""
    config = options(network_alpha=3.0, use_dora=trained.config.use_dora)
    model = with_adapters(trained.base, config)
    load_network(model, folder, config, SPEC, SPEC.model.dims)
    return model


def by_hand(trained: Trained, folder: Path) -> torch.nn.Module:
    """What the original's inference does: W + alpha / rank B A, the layer found by its name with underscores."""
    model = load_model(trained.base)
    layers = {name.replace(".", "_"): module for name, module in model.named_modules()}
    tensors = load_file(folder / "checkpoint-6.safetensors")
    names = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    assert len(names) == 10
    for name in names:
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        plain_name = name.removeprefix("lora_unet__").removeprefix("diffusion_model.").replace(".", "_")
        layers[plain_name].weight.data += tensors[f"{name}.alpha"] / up.shape[1] * up @ down
    return model


LOADERS: list[tuple[str, Callable[[Trained, Path], torch.nn.Module]]] = [
    ("peft", through_peft),
    ("peft", through_training_on),
    ("diffusers", through_the_transformer),
    ("diffusers", through_the_pipeline),
    ("diffusers", through_training_on),
    ("comfyui", by_hand),
    ("comfyui", through_training_on),
    ("original", by_hand),
    ("original", through_training_on),
]


@pytest.mark.parametrize(("format", "loader"), LOADERS, ids=[f"{name}-{load.__name__}" for name, load in LOADERS])
def test_every_loader_predicts_what_was_trained(
    format: str, loader: Callable[[Trained, Path], torch.nn.Module], trained: Trained, tmp_path: Path
) -> None:
    if trained.config.use_dora and format in ("comfyui", "original"):
        with pytest.raises(ConfigError, match="cannot carry DoRA"):
            export_adapter(trained.checkpoint, tmp_path / "out", format=format)
        return
    result = export_adapter(trained.checkpoint, tmp_path / "out", format=format, dtype="fp32")
    assert result.verified
    torch.testing.assert_close(predict(loader(trained, result.output)), trained.prediction, atol=1e-5, rtol=0)


def test_merged_weights_predict_what_was_trained(trained: Trained, tmp_path: Path) -> None:
    merge_adapter(trained.checkpoint, tmp_path / "merged", base_dir=trained.base, dtype="fp32")
    model = load_model(tmp_path / "merged")
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(predict(model), trained.prediction, atol=1e-5, rtol=0)


def test_a_merge_in_bf16_is_the_float32_one_rounded(plain: Trained, tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        merge_adapter(plain.checkpoint, tmp_path / dtype, base_dir=plain.base, dtype=dtype)
    exact, rounded = (load_file(tmp_path / d / "diffusion_pytorch_model.safetensors") for d in ("fp32", "bf16"))
    assert exact.keys() == rounded.keys() == load_file(plain.base / "diffusion_pytorch_model.safetensors").keys()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_shards_of_a_merge_are_those_of_one_file(plain: Trained, tmp_path: Path) -> None:
    one = merge_adapter(plain.checkpoint, tmp_path / "one", base_dir=plain.base)
    many = merge_adapter(plain.checkpoint, tmp_path / "many", base_dir=plain.base, max_shard_size="20KB")
    assert len(list(many.output.glob("*.safetensors"))) > 2
    assert one.sha256 == many.sha256


def test_exports_are_bf16(plain: Trained, tmp_path: Path) -> None:
    for format in FORMATS:
        folder = export_adapter(plain.checkpoint, tmp_path / format, format=format).output
        tensors = load_file(next(folder.glob("*.safetensors")))
        matrices = {value.dtype for value in tensors.values() if value.dim() == 2}
        assert matrices == {torch.bfloat16}


def adapter_of_layers(folder: Path, layers: Mapping[str, tuple[int, int]]) -> Path:
    """A LoRA checkpoint by hand, for layers of these [out, in] features: rank 2, alpha 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (rows, columns) in layers.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    model = folder / "checkpoint-1/model"
    model.mkdir(parents=True)
    save_file(tensors, model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    return model.parent


def product(tensors: dict[str, Tensor], layer: str) -> Tensor:
    return tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]


def test_wan_layers_get_their_released_names_and_diffusers_reads_them_at_the_right_strength(tmp_path: Path) -> None:
    layers = ("attn1.to_q", "attn2.add_k_proj", "attn2.add_v_proj", "ffn.net.0.proj")
    checkpoint = adapter_of_layers(tmp_path, {f"blocks.0.{layer}": (8, 8) for layer in layers})
    stored = load_file(checkpoint / "model/adapter_model.safetensors")
    for format, key in (
        ("comfyui", "diffusion_model.blocks.0.self_attn.q.alpha"),
        ("original", "lora_unet__blocks_0_self_attn_q.alpha"),
    ):
        folder = export_adapter(
            checkpoint, tmp_path / format, format=format, released=released_name, dtype="fp32"
        ).output
        assert load_file(folder / "checkpoint-1.safetensors")[key] == 1
    comfyui = load_file(tmp_path / "comfyui/checkpoint-1.safetensors")
    assert {name.rpartition(".lora_")[0] for name in comfyui if "lora_down" in name} == {
        "diffusion_model.blocks.0.self_attn.q",
        "diffusion_model.blocks.0.cross_attn.k_img",
        "diffusion_model.blocks.0.cross_attn.v_img",
        "diffusion_model.blocks.0.ffn.0",
    }
    read = WanPipeline.lora_state_dict(comfyui)
    for layer in ("attn1.to_q", "attn2.add_k_proj", "ffn.net.0.proj"):
        expected = 0.5 * product(stored, f"base_model.model.blocks.0.{layer}")
        torch.testing.assert_close(product(read, f"transformer.blocks.0.{layer}"), expected)


HUNYUAN = ModelDims(dim=3072, ffn_dim=4 * 3072, num_layers=1)
HUNYUAN_LAYERS = {
    "transformer_blocks.0.attn.to_q": (3072, 3072),
    "transformer_blocks.0.attn.to_k": (3072, 3072),
    "transformer_blocks.0.attn.to_v": (3072, 3072),
    "transformer_blocks.0.attn.add_v_proj": (3072, 3072),
    "transformer_blocks.0.attn.to_add_out": (3072, 3072),
    "transformer_blocks.0.ff.net.0.proj": (12288, 3072),
    "transformer_blocks.0.ff_context.net.2": (3072, 12288),
    "single_transformer_blocks.1.attn.to_q": (3072, 3072),
    "single_transformer_blocks.1.attn.to_v": (3072, 3072),
    "single_transformer_blocks.1.proj_mlp": (12288, 3072),
    "single_transformer_blocks.2.attn.to_k": (3072, 3072),
    "single_transformer_blocks.2.proj_out": (3072, 15360),
}
"""At the width that diffusers' reader of joint layers takes for granted."""


@pytest.mark.slow
def test_layers_that_comfyui_joins_become_one_with_the_same_update(tmp_path: Path) -> None:
    checkpoint = adapter_of_layers(tmp_path, HUNYUAN_LAYERS)
    stored = load_file(checkpoint / "model/adapter_model.safetensors")
    folder = export_adapter(
        checkpoint,
        tmp_path / "out",
        format="comfyui",
        locate=lambda layer: comfyui_location(layer, HUNYUAN),
        dtype="fp32",
    ).output
    written = load_file(folder / "checkpoint-1.safetensors")
    assert {name.rpartition(".")[0] for name in written if name.endswith(".alpha")} == {
        "diffusion_model.double_blocks.0.img_attn_qkv",
        "diffusion_model.double_blocks.0.txt_attn_qkv",
        "diffusion_model.double_blocks.0.txt_attn_proj",
        "diffusion_model.double_blocks.0.img_mlp.fc1",
        "diffusion_model.double_blocks.0.txt_mlp.fc2",
        "diffusion_model.single_blocks.1.linear1",
        "diffusion_model.single_blocks.2.linear1",
        "diffusion_model.single_blocks.2.linear2",
    }
    assert written["diffusion_model.double_blocks.0.img_attn_qkv.lora_up.weight"].shape == (3 * 3072, 6)
    assert written["diffusion_model.single_blocks.2.linear1.lora_up.weight"].shape == (7 * 3072, 2)
    for name in [name for name in written if name.endswith(".alpha")]:  # diffusers' reader knows no alpha here
        rank = len(written[name.replace(".alpha", ".lora_down.weight")])
        assert written.pop(name) == rank
    renamed = {
        name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value for name, value in written.items()
    }
    read = HunyuanVideoPipeline.lora_state_dict(renamed)
    for layer in HUNYUAN_LAYERS:
        expected = 0.5 * product(stored, f"base_model.model.{layer}")
        torch.testing.assert_close(product(read, f"transformer.{layer}"), expected)
    absent = "transformer.single_transformer_blocks.2.attn.to_v"
    assert not product(read, absent).any()


def test_a_layer_that_comfyui_loads_no_lora_for_is_refused(tmp_path: Path) -> None:
    checkpoint = adapter_of_layers(tmp_path, {"another.proj": (64, 3072)})
    with pytest.raises(ConfigError, match=r"ComfyUI loads no LoRA for another\.proj"):
        export_adapter(
            checkpoint, tmp_path / "out", format="comfyui", locate=lambda layer: comfyui_location(layer, HUNYUAN)
        )
    assert not (tmp_path / "out").exists()


def test_what_diffusers_saves_itself_is_read_at_its_strength(plain: Trained, tmp_path: Path) -> None:
    model = with_adapters(plain.base, plain.config)
    load_network(model, plain.checkpoint, plain.config, SPEC, SPEC.model.dims)
    setting = {**model.peft_config["default"].to_dict(), "target_modules": sorted(TARGETS)}
    CogVideoXPipeline.save_lora_weights(
        str(tmp_path),
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata={name: setting[name] for name in ("r", "lora_alpha", "target_modules")},
    )
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert {adapter.scale(pair) for pair in adapter.pairs.values()} == {0.5}
    torch.testing.assert_close(predict(through_training_on(plain, tmp_path)), plain.prediction, atol=1e-5, rtol=0)


def test_what_cannot_be_exported_says_why(plain: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"comfyui.*Did you mean 'comfyui'"):
        export_adapter(plain.checkpoint, tmp_path / "out", format="comfui")
    with pytest.raises(ConfigError, match="exists already"):
        export_adapter(plain.checkpoint, plain.base, format="peft")
    with pytest.raises(CheckpointError, match="holds no moving average"):
        export_adapter(plain.checkpoint, tmp_path / "out", format="peft", weights="ema")
    other = model_directory(tmp_path / "other")
    (other / "diffusion_pytorch_model.safetensors").unlink()
    save_file({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(3, 3)}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot take its adapter"):
        merge_adapter(plain.checkpoint, tmp_path / "out", base_dir=other)
    file = plain.checkpoint / "model/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if "0.attn1.to_q.lora_B" not in name}, file)
    with pytest.raises(CheckpointError, match=r"attn1\.to_q has only one of its two matrices"):
        export_adapter(plain.checkpoint, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_the_moving_average_is_exported_in_its_place(plain: Trained, tmp_path: Path) -> None:
    weights = load_file(plain.checkpoint / "model/adapter_model.safetensors")
    average = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): 2 * value
        for name, value in weights.items()
    }
    save_file(average, plain.checkpoint / "model/ema.safetensors")
    folder = export_adapter(plain.checkpoint, tmp_path / "out", format="peft", dtype="fp32", weights="ema").output
    exported = load_file(folder / "adapter_model.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], 2 * value) for name, value in weights.items())


def test_the_command_exports_and_merges(plain: Trained, tmp_path: Path) -> None:
    model: Path = plain.base.parent
    state = {
        "schema": 1, "family": "cogvideox-fun", "kind": "lora", "step": 6, "strategy": "single", "world_size": 1,
        "run_config": {
            "pretrained_model_name_or_path": str(model), "num_processes": 1, "gradient_accumulation_steps": 1,
        },
    }  # fmt: skip
    (plain.checkpoint / "state.json").write_text(json.dumps(state))
    manifest.write_manifest(plain.checkpoint)

    def run(*arguments: str) -> Said:
        return vfun_here("export-bf16", str(plain.checkpoint), *arguments)

    done = run("--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["tensors"] == 20
    assert (tmp_path / "checkpoint-6-outputs/adapter_config.json").is_file()
    assert run("--merge", "--output", str(tmp_path / "merged")).code == 0
    assert isinstance(load_model(tmp_path / "merged"), CogVideoXFunTransformer)
    refused = run("--merge", "--format", "comfyui", "--output", str(tmp_path / "no"))
    assert refused.code == 2
    assert "a merged model of cogvideox-fun comes as: same" in " ".join(refused.err.split())
