"""The export: same bytes from every strategy, torch's rounding, verified, never half finished."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.torch import load_file
from write_sample import FROZEN, STRATEGIES, sample_weights

from vfun_cli.checkpoints import export as export_module
from vfun_cli.checkpoints import tensors
from vfun_cli.checkpoints.export import export
from vfun_cli.checkpoints.tensors import convert, fp32_to_bf16
from vfun_cli.checkpoints.writer import Entry, content_hash, parse_size
from vfun_cli.errors import CheckpointError, ConfigError, RunError

SPECIAL = [0, 0x80000000, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0x7FFFFFFF]
TIES = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x00008000, 0x00018000, 0x7F7F8000, 0xFF7F7FFF]


@pytest.mark.slow
@settings(max_examples=200)
@given(
    hnp.arrays(
        np.uint32, st.integers(1, 200), elements=st.one_of(st.integers(0, 2**32 - 1), st.sampled_from(SPECIAL + TIES))
    )
)
def test_rounding_to_bf16_is_that_of_torch(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    ours = np.empty(len(bits), np.uint16)
    fp32_to_bf16(values, ours)
    expected = torch.from_numpy(values.copy()).bfloat16()
    nan = np.isnan(values)
    assert np.isnan(tensors.bf16_to_fp32(ours)[nan]).all()  # torch's own kernels disagree on which NaN it is
    np.testing.assert_array_equal(ours[~nan], expected.view(torch.uint16).numpy()[~nan])


def test_every_bf16_value_between_two_floats_rounds_as_torch_does() -> None:
    # all 65536 upper halves with the lower halves around the tie, over several conversion blocks
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = ((np.arange(65536, dtype=np.uint32) << 16)[:, None] | low).ravel()
    values = bits.view(np.float32)
    ours = np.empty(len(bits), np.uint16)
    fp32_to_bf16(values, ours)
    theirs = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert len(bits) > tensors.BLOCK
    np.testing.assert_array_equal(ours[~np.isnan(values)], theirs[~np.isnan(values)])


@pytest.mark.parametrize(("source", "target"), [("BF16", "F16"), ("BF16", "F32"), ("F32", "F16"), ("F16", "BF16")])
def test_other_conversions_are_those_of_torch(source: str, target: str) -> None:
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    original = torch.randn(999, generator=torch.Generator().manual_seed(0)).mul(1e4).to(kinds[source])
    raw = original.view(torch.uint16).numpy() if source == "BF16" else original.numpy()
    got = convert(raw, source, target, np.empty(999, np.float32))
    expected = original.to(kinds[target])
    np.testing.assert_array_equal(got, (expected.view(torch.uint16) if target == "BF16" else expected).numpy())


def test_every_strategy_exports_the_same_bytes(samples: Path, base: Path, tmp_path: Path) -> None:
    results = {s: export(samples / s, tmp_path / s, base_dir=base) for s in STRATEGIES}
    files = {(tmp_path / s / "diffusion_pytorch_model.safetensors").read_bytes() for s in STRATEGIES}
    assert len(files) == 1
    assert len({result.sha256 for result in results.values()}) == 1
    assert all(result.verified for result in results.values())


def test_exported_weights_are_the_checkpoint_rounded_and_the_base_elsewhere(
    samples: Path, base: Path, tmp_path: Path
) -> None:
    result = export(samples / "zero3", tmp_path / "out", base_dir=base)
    released = {}
    for file in sorted(base.glob("*.safetensors")):
        released |= load_file(file)
    found = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == released.keys()
    assert result.tensors == len(found) and result.bytes == sum(t.nbytes for t in found.values())
    for name, weight in sample_weights().items():
        assert torch.equal(found[name], torch.from_numpy(weight).bfloat16())
    for name in FROZEN:
        assert torch.equal(found[name], released[name].bfloat16())
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    with safe_open(tmp_path / "out" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_sharding_changes_files_but_not_the_content_hash(samples: Path, base: Path, tmp_path: Path) -> None:
    whole = export(samples / "fsdp", tmp_path / "whole", base_dir=base)
    sharded = export(samples / "fsdp", tmp_path / "sharded", base_dir=base, max_shard_size="300B")
    assert whole.sha256 == sharded.sha256
    index = json.loads((tmp_path / "sharded" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one = load_file(tmp_path / "whole" / "diffusion_pytorch_model.safetensors")
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "sharded" / file)[name], one[name])
    assert index["metadata"]["total_size"] == whole.bytes


def test_the_content_hash_does_not_depend_on_the_order_but_on_all_else() -> None:
    a, b = Entry(name="a", dtype="BF16", shape=(2, 3)), Entry(name="b", dtype="BF16", shape=(6,))
    digests = {"a": "00", "b": "11"}
    expected = content_hash([a, b], digests)
    assert content_hash([b, a], digests) == expected
    assert content_hash([a, b], {"a": "11", "b": "00"}) != expected
    assert content_hash([Entry(name="a", dtype="F16", shape=(2, 3)), b], digests) != expected
    assert content_hash([Entry(name="a", dtype="BF16", shape=(3, 2)), b], digests) != expected


def test_tensors_larger_than_a_read_are_whole(
    samples: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(samples / "zero3", tmp_path / "a", base_dir=base)
    monkeypatch.setattr(tensors, "CHUNK", 17)
    monkeypatch.setattr(export_module, "CHUNK", 17)
    assert export(samples / "zero3", tmp_path / "b", base_dir=base).sha256 == whole.sha256


def test_averaged_weights_are_exported_on_request(samples: Path, base: Path, tmp_path: Path) -> None:
    export(samples / "single", tmp_path / "ema", base_dir=base, weights="ema")
    found = load_file(tmp_path / "ema" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(found["head.bias"], torch.from_numpy(sample_weights()["head.bias"] * 2).bfloat16())
    with pytest.raises(CheckpointError, match="no moving average"):
        export(samples / "zero2", tmp_path / "none", base_dir=base, weights="ema")


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_other_dtypes(samples: Path, base: Path, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    export(samples / "fsdp", tmp_path / "out", base_dir=base, dtype=dtype)
    found = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(found["head.weight"], torch.from_numpy(sample_weights()["head.weight"]).to(kind))


def test_names_are_translated_and_unknown_ones_refused(samples: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"8 trained weights have no place .* x\.blocks"):
        export(samples / "fsdp", tmp_path / "out", base_dir=base, names=lambda name: f"x.{name}")
    swap = {"blocks.0.q.bias": "blocks.0.q.weight"}
    with pytest.raises(CheckpointError, match="two trained weights have the same name"):
        export(samples / "fsdp", tmp_path / "out", base_dir=base, names=lambda name: swap.get(name, name))
    assert not any(tmp_path.iterdir())


def test_an_existing_output_is_kept_unless_overwritten(samples: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="exists"):
        export(samples / "fsdp", tmp_path / "out", base_dir=base)
    assert (tmp_path / "out" / "precious").read_text() == "x"
    with pytest.raises(ConfigError, match="precious"):
        export(samples / "fsdp", tmp_path / "out", base_dir=base, overwrite=True)
    (tmp_path / "out" / "precious").unlink()
    export(samples / "fsdp", tmp_path / "out", base_dir=base, overwrite=True)
    export(samples / "fsdp", tmp_path / "out", base_dir=base, max_shard_size="300B", overwrite=True)
    export(samples / "fsdp", tmp_path / "out", base_dir=base, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_an_interrupted_export_leaves_nothing_and_keeps_the_old_one(samples: Path, base: Path, tmp_path: Path) -> None:
    export(samples / "fsdp", tmp_path / "out", base_dir=base)
    before = (tmp_path / "out" / "diffusion_pytorch_model.safetensors").read_bytes()
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(samples / "zero2", tmp_path / "out", base_dir=base, overwrite=True, progress=interrupt)
    assert calls
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_byte_that_changes_on_the_disk_is_found(
    samples: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = os.pwrite

    def flipping(descriptor: int, data: object, offset: int) -> int:
        payload = bytearray(data)  # type: ignore[call-overload]
        if len(payload) == 2 * 17 * 19:  # head.weight
            payload[100] ^= 1
        return honest(descriptor, payload, offset)

    monkeypatch.setattr(os, "pwrite", flipping)
    with pytest.raises(CheckpointError, match=r"read back otherwise than written, e.g. head\.weight"):
        export(samples / "single", tmp_path / "out", base_dir=base)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before_anything_is_written(
    samples: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., object] = export_module.shutil.disk_usage
    usage = real(tmp_path)
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: usage._replace(free=10))  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="free"):
        export(samples / "fsdp", tmp_path / "out", base_dir=base)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"), [("10GB", 10**10), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("7", 7), ("1.5kb", 1500)]
)
def test_sizes_are_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "ten"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)
