"""One model whichever way its weights are named: a checkpoint, its export, the base with its LoRA in every format."""

import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_loras import FOREIGN, JOINT, JOINT_FILES
from safetensors.torch import load_file, save_file
from torch import Tensor

from vfun_cli import families
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.given import Given
from vfun_cli.commands.exporting import Form, export
from vfun_cli.demo.default import make_model
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families import adapter_of, trained
from vfun_cli.families.given import require_given
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.adapter import AdapterOptions
from vfun_cli.modeling.lazy_weights import LazyWeights
from vfun_cli.sampling import weights
from vfun_cli.sampling.source import find_source
from vfun_cli.sampling.weights import LoadOptions, load_model

pytestmark = pytest.mark.slow

FAMILIES = ("wan-s2v", "wan-fun-control", "hunyuanvideo-t2v", "easyanimate-v5.1-control", "cogvideox-fun")
FULL = [(name, form) for name in FAMILIES for form in families.find(name).export.names]
FULL.append(("hunyuanvideo-t2v", "original"))
LORAS = [(name, form) for name in FAMILIES for form in families.find(name).export.lora_formats]
TARGETS = ("q", "v", "to_q", "to_v", "ffn.0", "ff.net.2", "proj_mlp")
CPU = LoadOptions(device=torch.device("cpu"), compute_dtype=torch.float32)
RANK, ALPHA = 2, 1

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Base:
    """The tiny model of a family."""

    spec: FamilySpec
    folder: Path
    weights: Weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    folder, made = tmp_path_factory.mktemp("models"), dict[str, Base]()

    def of(family: str) -> Base:
        if family not in made:
            spec = families.find(family)
            model = make_model(spec, folder)
            made[family] = Base(spec=spec, folder=model, weights=loaded(model))
        return made[family]

    return of


def loaded(name: Path | None, **options: Any) -> Weights:
    """The transformer's weights of what is named, in float32."""
    adapter = load_model(find_source(name and str(name), output_dir=Path("nowhere"), **options), CPU)
    assert not adapter.transformer.training and not any(each.requires_grad for each in adapter.transformer.parameters())
    return {name: parameter.detach() for name, parameter in adapter.transformer.named_parameters()}


def other_values(of: Mapping[str, Tensor], seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in of.items()}


def write_checkpoint(base: Base, folder: Path, kind: str, tensors: Weights, average: Weights) -> Path:
    """As ``vfun train`` or ``lora`` leaves it on one process, without moments."""
    checkpoint = folder / "checkpoint-3"
    (checkpoint / "model").mkdir(parents=True)
    file = {"train": "model.safetensors", "lora": "adapter_model.safetensors"}[kind]
    save_file(tensors, checkpoint / "model" / file)
    save_file(average, checkpoint / "model/ema.safetensors")
    if kind == "lora":
        settings = {"lora_alpha": ALPHA, "r": RANK, "use_rslora": False}
        (checkpoint / "model/adapter_config.json").write_text(json.dumps(settings))
    (checkpoint / "config").mkdir()
    shutil.copy2(base.folder / base.spec.model.config_file, checkpoint / "config/config.json")
    state = {
        "schema": 1, "family": base.spec.name, "kind": kind, "step": 3, "strategy": "single", "world_size": 1,
        "run_config": {
            "pretrained_model_name_or_path": str(base.folder), "num_processes": 1, "gradient_accumulation_steps": 1,
        },
    }  # fmt: skip
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest.write_manifest(checkpoint)
    return checkpoint


def adapter_of_layers(base: Base, seed: int, *, dora: bool = False) -> Weights:
    """Pairs for some layers of the blocks, by the module's names."""
    generator, pairs = torch.Generator().manual_seed(seed), Weights()
    for name, weight in base.weights.items():
        layer = name.removesuffix(".weight")
        if "blocks." in name and layer.endswith(TARGETS) and weight.dim() == 2:
            pairs[f"{layer}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=generator)
            pairs[f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], RANK, generator=generator)
            if dora:
                pairs[f"{layer}.lora_magnitude_vector"] = torch.rand(weight.shape[0], generator=generator) + 0.5
    assert len(pairs) >= 8
    return pairs


def peft_names(pairs: Weights) -> Weights:
    return {f"base_model.model.{name}": value for name, value in pairs.items()}


def with_update(base: Base, pairs: Weights, strength: float = ALPHA / RANK) -> Weights:
    """By hand: W + strength · B·A."""
    result = dict(base.weights)
    for name in [name for name in pairs if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        result[f"{layer}.weight"] = result[f"{layer}.weight"] + strength * pairs[f"{layer}.lora_B.weight"] @ pairs[name]
    return result


def exported(checkpoint: Path, output: Path, form: str, **changed: Any) -> Path:
    settings = {"dtype": "fp32", "merge": False, "ema": False, "max_shard_size": "100KB", "overwrite": False}
    found = trained.find(str(checkpoint), output_dir=Path("nowhere"), model=None)
    return export(found, output, Form(**(settings | {"format": form} | changed))).output


def assert_same(found: Weights, expected: Weights, tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("family", "form"), FULL)
def test_full_weights_are_the_same_from_the_checkpoint_and_from_its_export(
    family: str, form: str, base: Callable[[str], Base], tmp_path: Path
) -> None:
    model = base(family)
    frozen = next(iter(model.weights))
    values = other_values(model.weights, 1)
    values.pop(frozen)  # as --trainable-modules leaves it out of a checkpoint
    checkpoint = write_checkpoint(model, tmp_path, "train", values, other_values(values, 2))
    expected = model.weights | values
    assert_same(loaded(checkpoint), expected)
    assert_same(loaded(tmp_path), expected)  # the run
    rounded = {name: value.bfloat16().float() for name, value in expected.items()}
    assert_same(loaded(exported(checkpoint, tmp_path / "bf16", form, dtype="bf16")), rounded)


@pytest.mark.parametrize(("family", "form"), FULL)
def test_a_run_starts_from_every_form_of_full_weights(
    family: str, form: str, base: Callable[[str], Base], tmp_path: Path
) -> None:
    """As the trainer loads ``--transformer-path``, at once and from its files later; and as the launch looks at it."""
    model = base(family)
    values = other_values(model.weights, 1)
    checkpoint = write_checkpoint(model, tmp_path, "train", values, {})
    given = Given(transformer=exported(checkpoint, tmp_path / "out", form))
    require_given(model.spec, model.folder, given)
    options = AdapterOptions(model_dir=model.folder, given=given, compute_dtype=torch.float32, device=CPU.device)
    for lazy in (False, True):
        stored = LazyWeights()
        with stored.transformer() if lazy else nullcontext():
            transformer = adapter_of(model.spec).from_pretrained(options).transformer
        found = {name: stored.value(each, CPU.device).detach() for name, each in transformer.named_parameters()}
        assert_same(found, {name: values[name] for name in found})


@pytest.mark.parametrize(("family", "form"), LORAS)
def test_a_lora_adds_the_same_from_its_checkpoint_and_in_every_format(
    family: str, form: str, base: Callable[[str], Base], tmp_path: Path
) -> None:
    model = base(family)
    pairs = adapter_of_layers(model, 1)
    checkpoint = write_checkpoint(model, tmp_path, "lora", peft_names(pairs), {})
    expected = with_update(model, pairs)
    lora = exported(checkpoint, tmp_path / "lora", form)
    file = next(lora.glob("*.safetensors"))
    assert_same(loaded(checkpoint), expected, 1e-5)
    assert_same(loaded(lora), expected, 1e-5)
    assert_same(loaded(file), expected, 1e-5)
    assert_same(loaded(model.folder, lora=file), expected, 1e-5)
    assert_same(loaded(model.folder, lora=file, strength=0.25), with_update(model, pairs, 0.25 * ALPHA / RANK), 1e-5)


def test_a_merged_lora_is_its_base_with_the_update(base: Callable[[str], Base], tmp_path: Path) -> None:
    model = base("wan-fun-control")
    pairs = adapter_of_layers(model, 1)
    checkpoint = write_checkpoint(model, tmp_path, "lora", peft_names(pairs), {})
    merged = exported(checkpoint, tmp_path / "merged", "same", merge=True)
    assert_same(loaded(merged), with_update(model, pairs), 1e-5)


def test_the_first_releases_names_are_those_that_diffusers_converts(
    base: Callable[[str], Base], tmp_path: Path
) -> None:
    """By its converter of single files, which takes the width of the released model for granted in one place."""
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers as convert

    model = base("hunyuanvideo-t2v")
    checkpoint = write_checkpoint(model, tmp_path, "train", dict(model.weights), {})
    output = exported(checkpoint, tmp_path / "out", "original")
    stored = {name: value for file in output.glob("*.safetensors") for name, value in load_file(file).items()}
    assert {
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "img_in.proj.weight",
        "final_layer.linear.weight",
        "guidance_in.mlp.0.weight",
        "double_blocks.0.img_attn_qkv.weight",
    } <= stored.keys()  # ComfyUI's look at it
    dim = model.weights["transformer_blocks.0.attn.to_q.weight"].shape[0]
    for name in [name for name in stored if "linear1" in name]:
        kind, block = name.rpartition(".")[2], f"single_transformer_{name.partition('.linear1')[0][7:]}"
        parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        whole = torch.cat([model.weights[f"{block}.{part}.{kind}"] for part in parts])
        assert len(whole) > 3 * dim and torch.equal(stored.pop(name), whole)
    found = convert(stored)
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    others = {name for name in model.weights if "single_" in name and any(f".{part}." in name for part in parts)}
    assert_same(found, {name: value for name, value in model.weights.items() if name not in others})


def test_a_merged_lora_comes_in_the_first_releases_names(base: Callable[[str], Base], tmp_path: Path) -> None:
    model = base("hunyuanvideo-t2v")
    pairs = adapter_of_layers(model, 1)
    norm = "norm_out.linear"
    pairs[f"{norm}.lora_A.weight"] = torch.randn(RANK, model.weights[f"{norm}.weight"].shape[1])
    pairs[f"{norm}.lora_B.weight"] = torch.randn(len(model.weights[f"{norm}.weight"]), RANK)
    checkpoint = write_checkpoint(model, tmp_path, "lora", peft_names(pairs), {})
    merged = exported(checkpoint, tmp_path / "merged", "original", merge=True)
    assert_same(loaded(merged), with_update(model, pairs), 1e-5)


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_dora_has_its_magnitudes(form: str, base: Callable[[str], Base], tmp_path: Path) -> None:
    model = base("cogvideox-fun")
    pairs = adapter_of_layers(model, 1, dora=True)
    checkpoint = write_checkpoint(model, tmp_path, "lora", peft_names(pairs), {})
    expected = with_update(model, pairs)
    for name, magnitude in pairs.items():
        if name.endswith("magnitude_vector"):
            weight = expected[name.replace("lora_magnitude_vector", "weight")]
            weight *= (magnitude / weight.norm(dim=1))[:, None]
    assert_same(loaded(checkpoint), expected, 1e-5)
    assert_same(loaded(exported(checkpoint, tmp_path / "out", form)), expected, 1e-5)


def test_a_lora_goes_over_trained_weights(base: Callable[[str], Base], tmp_path: Path) -> None:
    model = base("wan-fun-control")
    values, pairs = other_values(model.weights, 1), adapter_of_layers(model, 2)
    full = write_checkpoint(model, tmp_path / "full", "train", values, {})
    lora = write_checkpoint(model, tmp_path / "lora", "lora", peft_names(pairs), {})
    tuned = Base(spec=model.spec, folder=model.folder, weights=values)
    assert_same(loaded(full, lora=lora), with_update(tuned, pairs), 1e-5)
    once = Base(spec=model.spec, folder=model.folder, weights=with_update(model, pairs))
    assert_same(loaded(lora, lora=lora, strength=3), with_update(once, pairs, 3 * ALPHA / RANK), 1e-5)


def test_a_lora_alone_is_over_its_own_base(base: Callable[[str], Base], tmp_path: Path) -> None:
    model = base("wan-fun-control")
    pairs = adapter_of_layers(model, 1)
    checkpoint = write_checkpoint(model, tmp_path, "lora", peft_names(pairs), {})
    file = exported(checkpoint, tmp_path / "out", "original") / "checkpoint-3.safetensors"
    assert_same(loaded(None, lora=file), with_update(model, pairs), 1e-5)
    assert_same(loaded(None, lora=checkpoint, strength=2), with_update(model, pairs, 2 * ALPHA / RANK), 1e-5)
    elsewhere = shutil.copy2(file, tmp_path)
    assert_same(loaded(None, lora=Path(elsewhere), model=model.folder), with_update(model, pairs), 1e-5)


def test_joint_layers_may_have_underscores_for_dots(base: Callable[[str], Base], tmp_path: Path) -> None:
    """As other trainers of HunyuanVideo name them."""
    model = base("hunyuanvideo-t2v")
    pairs = adapter_of_layers(model, 1)
    checkpoint = write_checkpoint(model, tmp_path, "lora", peft_names(pairs), {})
    file = exported(checkpoint, tmp_path / "out", "comfyui") / "checkpoint-3.safetensors"
    renamed = {}
    for name, value in load_file(file).items():
        layer, _, rest = name.removeprefix("diffusion_model.").partition(".lora_" if ".lora_" in name else ".alpha")
        renamed["lora_unet_" + layer.replace(".", "_") + name[len(f"diffusion_model.{layer}") :]] = value
        assert rest or name.endswith(".alpha")
    save_file(renamed, tmp_path / "kohya.safetensors")
    found = loaded(model.folder, lora=tmp_path / "kohya.safetensors")
    assert_same(found, with_update(model, pairs), 1e-5)


@pytest.mark.parametrize("trainer", FOREIGN)
def test_a_file_of_another_trainer_adds_what_its_own_loader_would(
    trainer: str, base: Callable[[str], Base], tmp_path: Path
) -> None:
    foreign = FOREIGN[trainer]
    model = base(foreign.family)
    pairs = adapter_of_layers(model, 1)
    tensors = foreign.of(pairs, model.spec.export.names["same"])
    save_file(tensors, tmp_path / "lora.safetensors", dict(foreign.header))
    found = loaded(model.folder, lora=tmp_path / "lora.safetensors")
    assert_same(found, with_update(model, pairs, foreign.strength), 1e-5)


@pytest.mark.parametrize("trainer", JOINT_FILES)
def test_joint_layers_of_another_trainer_add_their_rows(
    trainer: str, base: Callable[[str], Base], tmp_path: Path
) -> None:
    model, generator = base("hunyuanvideo-t2v"), torch.Generator().manual_seed(0)
    pairs, expected = Weights(), dict(model.weights)
    for name, layers in JOINT.items():
        weights = [model.weights[f"{layer}.weight"] for layer in layers]
        down = pairs[f"{name}.lora_A.weight"] = torch.randn(RANK, weights[0].shape[1], generator=generator)
        rows = sum(len(weight) for weight in weights)
        up = pairs[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
        update = JOINT_FILES[trainer].strength * up @ down
        for layer, part in zip(layers, update.split([len(weight) for weight in weights]), strict=True):
            expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + part
    file = tmp_path / "lora.safetensors"
    save_file(JOINT_FILES[trainer].of(pairs, lambda name: name), file)
    assert_same(loaded(model.folder, lora=file), expected, 1e-5)


@pytest.mark.parametrize("kind", ["train", "lora"])
def test_the_moving_average_is_taken_in_the_place_of_the_weights(
    kind: str, base: Callable[[str], Base], tmp_path: Path
) -> None:
    model = base("hunyuanvideo-t2v")
    of = {"train": lambda seed: other_values(model.weights, seed), "lora": lambda seed: adapter_of_layers(model, seed)}
    last, average = of[kind](1), of[kind](2)
    names = {"train": dict, "lora": peft_names}[kind]
    live = {name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): value
            for name, value in average.items()}  # fmt: skip
    checkpoint = write_checkpoint(model, tmp_path, kind, names(last), live)
    expected = {"train": dict, "lora": lambda pairs: with_update(model, pairs)}[kind](average)
    assert_same(loaded(checkpoint, ema=True), expected, 1e-5)


def test_the_newest_checkpoint_is_the_default(base: Callable[[str], Base], tmp_path: Path) -> None:
    model = base("cogvideox-fun")
    checkpoint = write_checkpoint(model, tmp_path, "train", other_values(model.weights, 1), {})
    assert find_source(None, output_dir=tmp_path).path == checkpoint
    assert find_source("checkpoint-3", output_dir=tmp_path).path == checkpoint


def test_a_lora_that_states_no_strength_is_asked_for_it(base: Callable[[str], Base], tmp_path: Path) -> None:
    model = base("cogvideox-fun")
    pairs = adapter_of_layers(model, 1)
    file = tmp_path / "adapter_model.safetensors"
    save_file(peft_names(pairs), file)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors does not state its strength") as error:
        loaded(model.folder, lora=file)
    assert "--lora-strength" in (error.value.hint or "")
    assert_same(loaded(model.folder, lora=file, strength=0.5), with_update(model, pairs, 0.5), 1e-5)


def test_weights_of_another_model_are_refused_by_name(base: Callable[[str], Base], tmp_path: Path) -> None:
    model, other = base("cogvideox-fun"), base("wan-fun-control")
    lora = write_checkpoint(other, tmp_path / "other", "lora", peft_names(adapter_of_layers(other, 1)), {})
    with pytest.raises(CheckpointError, match=r"layers that this model does not have, e\.g\. blocks\.0\."):
        loaded(model.folder, lora=lora)
    name, value = next((name, value) for name, value in model.weights.items() if value.dim() == 2)
    for given, said in (({name: value[1:]}, f"another shape.*{name}"), ({"head.weight": value}, r"no place.*head\.we")):
        checkpoint = write_checkpoint(model, tmp_path / said[:5], "train", given, {})
        with pytest.raises(CheckpointError, match=said):
            loaded(checkpoint)
    full = write_checkpoint(model, tmp_path / "full", "train", dict(model.weights), {})
    with pytest.raises(CheckpointError, match="looks like a wan-fun-control model, not like cogvideox-fun"):
        loaded(exported(full, tmp_path / "out", "same"), model=other.folder)


def test_an_export_whose_model_is_gone_or_unknown_asks_for_it(base: Callable[[str], Base], tmp_path: Path) -> None:
    model = base("cogvideox-fun")
    moved = Base(spec=model.spec, folder=tmp_path / "model", weights=model.weights)
    shutil.copytree(model.folder, moved.folder)
    values = other_values(model.weights, 1)
    checkpoint = write_checkpoint(moved, tmp_path / "run", "train", values, {})
    output = exported(checkpoint, tmp_path / "out", "same")
    shutil.rmtree(moved.folder)
    for name in (checkpoint, output):
        with pytest.raises(CheckpointError, match="which is not there") as error:
            loaded(name)
        assert "--pretrained-model-name-or-path" in (error.value.hint or "")
        assert_same(loaded(name, model=model.folder), values)
    (output / ".vfun-export.json").unlink()
    with pytest.raises(CheckpointError, match="does not say to which model its weights belong"):
        loaded(output)
    assert_same(loaded(output, model=model.folder), values)


def test_options_without_a_meaning_are_refused(base: Callable[[str], Base], tmp_path: Path) -> None:
    model = base("cogvideox-fun").folder
    with pytest.raises(ConfigError, match="--ema"):
        find_source(str(model), output_dir=tmp_path, ema=True)
    with pytest.raises(ConfigError, match="--lora-strength"):
        find_source(str(model), output_dir=tmp_path, strength=0.5)
    with pytest.raises(CheckpointError, match="there is no LoRA nothing"):
        find_source(str(model), output_dir=tmp_path, lora=Path("nothing"))
    with pytest.raises(CheckpointError, match="there is no nothing, neither here"):
        find_source("nothing", output_dir=tmp_path)


def test_the_host_holds_one_weight_at_a_time(
    base: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base("cogvideox-fun")
    values = other_values(model.weights, 1)
    values.popitem()
    checkpoint = write_checkpoint(model, tmp_path, "train", values, {})
    read, alive, most = weights.read_float32, list[weakref.ref[np.ndarray]](), 0

    def counted(tensor: Any) -> Any:
        nonlocal most
        values = read(tensor)
        alive.append(weakref.ref(values))
        most = max(most, sum(each() is not None for each in alive))
        return values

    monkeypatch.setattr(weights, "read_float32", counted)
    source = find_source(str(checkpoint), output_dir=tmp_path)
    adapter = load_model(source, LoadOptions(device=torch.device("meta")))
    assert len(alive) == len(values) and most <= 2  # the one before goes when the next has come
    assert {parameter.dtype for parameter in adapter.transformer.parameters()} == {torch.bfloat16}


def test_an_export_is_the_same_file_for_other_programs(base: Callable[[str], Base], tmp_path: Path) -> None:
    model = base("cogvideox-fun")
    checkpoint = write_checkpoint(model, tmp_path, "train", dict(model.weights), {})
    output = exported(checkpoint, tmp_path / "out", "same")
    record = json.loads((output / ".vfun-export.json").read_text())
    assert record["family"] == "cogvideox-fun" and Path(record["model"]) == model.folder
    names = {path.name for path in output.iterdir()}
    assert set(record["files"]) == names - {".vfun-export.json"}
    stored = {name: value for file in output.glob("*.safetensors") for name, value in load_file(file).items()}
    assert_same(stored, model.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_from_given_weights_is_exported_and_sampled_over_them(
    family: str, base: Callable[[str], Base], tmp_path: Path
) -> None:
    origin = base(family)
    released = origin.spec.export.names["same"]
    started = other_values(origin.weights, 9)
    given = tmp_path / "started.safetensors"
    save_file({released(name): value for name, value in started.items()}, given)
    tuned = replace(origin, weights=started)

    pairs = adapter_of_layers(origin, 2)
    checkpoint = write_checkpoint(tuned, tmp_path / "lora", "lora", peft_names(pairs), {})
    full = write_checkpoint(tuned, tmp_path / "full", "train", dict(list(other_values(started, 4).items())[:3]), {})
    for path in (checkpoint, full):
        state = json.loads((path / "state.json").read_text())
        state["run_config"]["transformer_path"] = str(given)
        (path / "state.json").write_text(json.dumps(state))
        manifest.write_manifest(path)

    assert_same(loaded(given, model=origin.folder), started)
    assert_same(loaded(origin.folder, given=Given(transformer=given)), started)
    updated = with_update(tuned, pairs)
    assert_same(loaded(checkpoint), updated, 1e-5)
    assert_same(loaded(exported(checkpoint, tmp_path / "merged", "same", merge=True)), updated, 1e-5)
    assert_same(loaded(exported(checkpoint, tmp_path / "adapter", "peft")), updated, 1e-5)
    trained_ones = started | load_file(full / "model/model.safetensors")
    assert_same(loaded(full), trained_ones)
    assert_same(loaded(exported(full, tmp_path / "whole", "same")), trained_ones)

    moved = given.rename(tmp_path / "moved.safetensors")
    for path in (checkpoint, full):
        with pytest.raises(CheckpointError, match=r"started\.safetensors: there is no such file"):
            loaded(path)
    assert_same(loaded(checkpoint, given=Given(transformer=moved)), updated, 1e-5)
    assert_same(loaded(tmp_path / "whole"), trained_ones)  # which needs none of it
