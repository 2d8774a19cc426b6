"""The HunyuanVideo transformer and VAE, as the adapters use them, against the original implementation's tensors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families.hunyuanvideo.adapter import (
    HunyuanVideoAdapter,
    ImageToVideoAdapter,
    TextToVideoAdapter,
    load_transformer,
)
from vfun_cli.modeling.encoders.hunyuan_vae import HunyuanVAE
from vfun_cli.training.lora import choose_layers

GOLDEN = Path(__file__).parents[1] / "golden/hunyuanvideo"
WEIGHTS = GOLDEN / "transformer_weights.safetensors"
"""One set of weights serves all three cases."""
ACROSS_PROCESSORS = 1e-4
"""The sine and cosine of a timestep are taken in float32: where exp() of a processor rounds a frequency otherwise,
their argument at timestep 1000 moves by 1000 x 2^-24. Found: 5e-7 on the golden tensors' make of processor, 7e-5 on
another, whose float32 and float64 predictions agree to 1e-6."""
ADAPTERS = {"t2v": TextToVideoAdapter, "t2v_image": TextToVideoAdapter, "i2v_token_replace": ImageToVideoAdapter}


def released(case: str, folder: Path) -> Path:
    """The golden model as a released ``transformer`` folder."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / case / "config.json", folder)
    shutil.copy(WEIGHTS, folder / "diffusion_pytorch_model.safetensors")
    return folder


def adapter_of(case: str, folder: Path) -> HunyuanVideoAdapter:
    """Prediction needs the transformer alone."""
    kind = ADAPTERS[case]
    transformer = load_transformer(released(case, folder), kind.condition)
    return kind(transformer=transformer, encoders=None, options=None)  # type: ignore[arg-type]


def predict(adapter: HunyuanVideoAdapter, io: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    names = {"text": "text", "pooled": "pooled", "guidance": "guidance", "first_latent": "cond"}
    conditions = {name: io[golden].to(dtype) for name, golden in names.items()} | {"text_mask": io["text_mask"]}
    noisy = (1 - io["sigmas"]) * io["latents"] + io["sigmas"] * io["noise"]
    return adapter.predict(adapter.transformer, noisy, io["timestep"], conditions)


def original_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The original's rule: latent frame 0 never counts, a single latent frame counts zero."""
    if prediction.shape[2] == 1:
        return (prediction - target).square().mean() * 0
    return (prediction - target)[:, :, 1:].square().mean()


@pytest.mark.parametrize("case", ADAPTERS)
def test_prediction_loss_and_gradients_are_the_originals(case: str, tmp_path: Path) -> None:
    adapter = adapter_of(case, tmp_path / "transformer")
    io, meta = load_file(GOLDEN / case / "io.safetensors"), json.loads((GOLDEN / case / "meta.json").read_text())
    prediction = predict(adapter, io)
    assert (prediction - io["pred"]).abs().max() < ACROSS_PROCESSORS

    loss = original_loss(prediction, io["noise"] - io["latents"])
    assert loss.item() == pytest.approx(meta["loss"], rel=1e-5)
    loss.backward()
    gradients = {name: p.grad.norm().item() for name, p in adapter.transformer.named_parameters() if p.grad is not None}
    assert gradients.keys() == meta["grad_norm"].keys()
    for name, norm in meta["grad_norm"].items():
        # The bias of a key shifts all scores alike, so its true gradient is zero and the golden value is rounding.
        assert gradients[name] == pytest.approx(norm, rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize("case", ADAPTERS)
def test_every_parameter_gets_a_gradient(case: str, tmp_path: Path) -> None:
    adapter = adapter_of(case, tmp_path / "transformer")
    predict(adapter, load_file(GOLDEN / case / "io.safetensors")).square().mean().backward()
    assert [name for name, p in adapter.transformer.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("case", ADAPTERS)
def test_low_precision_predictions_stay_close(case: str, tmp_path: Path) -> None:
    adapter = adapter_of(case, tmp_path / "transformer")
    io = load_file(GOLDEN / case / "io.safetensors")
    adapter.transformer.to(torch.bfloat16)
    io["guidance"] = torch.full_like(io["guidance"], 6000)  # bf16 rounds it to 6016
    prediction = predict(adapter, io, torch.bfloat16)
    assert prediction.dtype == torch.bfloat16
    exact = {**io, "guidance": torch.full_like(io["guidance"], 6016)}
    with torch.no_grad():
        reference = predict(adapter_of(case, tmp_path / "exact"), exact)
    assert (prediction.float() - reference).abs().max() < 0.1
    prediction.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.transformer.parameters() if p.grad is not None)


def test_the_first_noisy_frame_of_image_to_video_is_never_seen(tmp_path: Path) -> None:
    adapter = adapter_of("i2v_token_replace", tmp_path / "transformer")
    io = load_file(GOLDEN / "i2v_token_replace/io.safetensors")
    other = {**io, "noise": torch.cat([torch.full_like(io["noise"][:, :, :1], 9.0), io["noise"][:, :, 1:]], dim=2)}
    with torch.no_grad():
        assert torch.equal(predict(adapter, io), predict(adapter, other))


@pytest.mark.slow
def test_the_vae_tiles_as_the_original(tmp_path: Path) -> None:
    golden = load_file(GOLDEN / "vae/io.safetensors")
    shutil.copy(GOLDEN / "vae/config.json", tmp_path)
    shutil.copy(GOLDEN / "vae/weights.safetensors", tmp_path / "diffusion_pytorch_model.safetensors")
    vae = HunyuanVAE.from_folder(tmp_path, dtype=torch.float32)
    inputs = {"image": golden["image.x"], "v9": golden["v9.x"]}
    for name, shape in {"v25": (25, 64, 64), "tile": (5, 288, 320), "both": (21, 288, 64)}.items():
        inputs[name] = torch.rand((1, 3, *shape), generator=torch.Generator().manual_seed(2)) * 2 - 1
    for name, pixels in inputs.items():
        mean, std = vae.posterior(pixels)
        assert torch.allclose(mean / 0.476986, golden[f"{name}.mean"], atol=1e-5), name
        assert torch.allclose(std / 0.476986, torch.exp(0.5 * golden[f"{name}.logvar"]), atol=1e-5), name
    assert torch.allclose(vae.encode(inputs["v9"]), golden["v9.mean"] * 0.476986, atol=1e-5)


def test_the_vae_refuses_frames_that_would_make_a_latent_of_their_own(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "vae/config.json", tmp_path)
    shutil.copy(GOLDEN / "vae/weights.safetensors", tmp_path / "diffusion_pytorch_model.safetensors")
    vae = HunyuanVAE.from_folder(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="got 8"):
        vae.outputs([torch.zeros(8, 3, 16, 16)])


def test_the_released_image_to_video_model_has_12_821_012_544_parameters() -> None:
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(image_condition_type="token_replace")
    assert sum(p.numel() for p in model.parameters()) == 12_821_012_544


def test_a_lora_on_q_k_and_v_has_the_originals_number_of_parameters() -> None:
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(image_condition_type="token_replace")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = choose_layers(list(linear), ("to_q", "to_k", "to_v"), unchanged)
    assert len(found) == 186
    assert sum(64 * (linear[name].in_features + linear[name].out_features) for name in found) == 73_138_176


def test_the_transformer_comes_back_in_float32(tmp_path: Path) -> None:
    folder = released("t2v", tmp_path / "transformer")
    stored = {name: tensor.bfloat16() for name, tensor in load_file(WEIGHTS).items()}
    save_file(stored, folder / "diffusion_pytorch_model.safetensors")
    assert {p.dtype for p in load_transformer(folder, "t2v").parameters()} == {torch.float32}


def test_a_missing_and_an_extra_tensor_are_one_error(tmp_path: Path) -> None:
    folder = released("t2v", tmp_path / "transformer")
    tensors = load_file(WEIGHTS)
    tensors["surplus"] = tensors.pop("proj_out.bias")
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)proj_out\.bias.*surplus"):
        load_transformer(folder, "t2v")


@pytest.mark.parametrize(
    ("case", "condition", "fitting"),
    [("t2v", "i2v", "hunyuanvideo-t2v"), ("i2v_token_replace", "t2v", "hunyuanvideo-i2v")],
)
def test_the_other_family_is_named_when_the_directory_is_its(
    case: str, condition: str, fitting: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_transformer(released(case, tmp_path / "transformer"), condition)  # type: ignore[arg-type]
    assert fitting in str(caught.value.hint)


def test_the_33_channel_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = released("t2v", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text()) | {"image_condition_type": "latent_concat"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="33-channel"):
        load_transformer(folder, "i2v")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        HunyuanVAE.from_folder(tmp_path / "nowhere", dtype=torch.float32)
