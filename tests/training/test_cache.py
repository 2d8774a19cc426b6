"""The cache: what it holds equals what the encoders give, nothing stale is ever taken, nothing half written counts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vfun_cli import families
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import EnvironmentFault
from vfun_cli.families.spec import FamilySpec
from vfun_cli.resolve import resolve
from vfun_cli.training.adapter import Inputs, ModelAdapter, SampleRequest
from vfun_cli.training.cache import Cache, entries, partials, prune, read_entry
from vfun_cli.training.encoding import encode, prepared
from vfun_cli.training.randomness import SampleKey
from vfun_cli.training.session import adapter_of, adapter_options, load_options

FAMILIES = tuple(families.FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of our own with the demos that the tests ask for."""
    folder, before = tmp_path_factory.mktemp("cache"), Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def config_of(spec: FamilySpec) -> Any:
    return resolve("train", spec, {"mixed_precision": "no"}, demo=demo_default.make(spec), environ={}).config


def adapter_for(spec: FamilySpec) -> ModelAdapter:
    return adapter_of(spec).from_pretrained(adapter_options(config_of(spec), torch.device("cpu")))


def request_for(spec: FamilySpec, folder: Path | None = None, **changes: Any) -> SampleRequest:
    """A clip of the family's demo, or of a copy of it."""
    root = folder or Path(config_of(spec).train_data_dir)
    record = {
        "file_path": str(root / "train/00000001.mp4"),
        "control_file_path": str(root / "control/00000001.mp4"),
        "audio_path": str(root / "wav/00000001.wav"),
        "text": "a red circle moves",
        "type": "video",
    }
    fields = {field.name for field in spec.fields} | {"text", "type"}
    asked = SampleRequest(
        key=SampleKey(seed=1, epoch=0, row=0),
        record={name: value for name, value in record.items() if name in fields},
        kind="video", frames=8 if spec.frame_rule == "4k" else 9, height=64, width=64, stride=1, total_frames=40,
        fps=(16, 1),
    )  # fmt: skip
    return replace(asked, **changes)


def inputs_for(spec: FamilySpec, request: SampleRequest) -> Inputs:
    return adapter_of(spec).inputs(request, load_options(config_of(spec), spec))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_clip_trains_like_an_encoded_one_without_any_encoder(family: str, tmp_path: Path) -> None:
    spec = families.find(family)
    adapter = adapter_for(spec)
    cache = Cache.for_encoders(tmp_path, adapter.encoders)
    requests = [request_for(spec, key=SampleKey(seed=1, epoch=0, row=row)) for row in (0, 1)]
    keys = [request.key for request in requests]
    plain = encode(adapter, [prepared(inputs_for(spec, request)) for request in requests], keys)
    missed = [prepared(inputs_for(spec, request), cache) for request in requests]
    assert not any(sample.found for sample in missed)
    filling = encode(adapter, missed, keys, cache)

    fresh = adapter_for(spec)
    found = [prepared(inputs_for(spec, request), cache) for request in requests]
    assert all(sample.inputs[name].encoder is None for sample in found for name in sample.values)
    cached = encode(fresh, found, keys, cache)
    assert not fresh.encoders.loaded
    for latents, conditions in (filling, cached):
        torch.testing.assert_close(latents, plain[0], rtol=0, atol=1e-5)
        assert set(conditions) == set(plain[1])
        for name, value in conditions.items():
            torch.testing.assert_close(value, plain[1][name], rtol=0, atol=1e-5)


S2V = families.find("wan-s2v")


def keys_of(cache: Cache, request: SampleRequest) -> dict[str, str]:
    return {name: cache.key(each) for name, each in inputs_for(S2V, request).items()}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert set(before) == set(after)
    return {name for name in before if before[name] != after[name]}


@pytest.fixture
def copied(workplace: Path, tmp_path: Path) -> Path:
    """Demo data that a test may change."""
    root = Path(config_of(S2V).train_data_dir)
    shutil.copytree(root, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    encoders = adapter_of(S2V).encoders_of(adapter_options(config_of(S2V), torch.device("cpu")))
    return Cache.for_encoders(tmp_path / "cache", encoders)


PIXELS = {"clip", "reference", "control"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"record": {"text": "a blue circle"}}, {"text"}),
        ({"height": 128}, PIXELS),
        ({"frames": 4}, {*PIXELS, "audio"}),  # another length is drawn another start
        ({"fps": (30000, 1001)}, {"audio"}),
        ({"stride": 2}, {*PIXELS, "audio"}),
        ({"key": SampleKey(seed=2, epoch=0, row=5)}, {*PIXELS, "audio"}),
        ({}, set()),
    ],
    ids=["caption", "size", "frames", "fps", "stride", "crop in time", "nothing"],
)
def test_a_change_of_the_clip_changes_exactly_what_depends_on_it(
    change: dict[str, Any], expected: set[str], cache: Cache
) -> None:
    request = request_for(S2V, key=SampleKey(seed=1, epoch=0, row=3))
    record = {**request.record, **change.get("record", {})}
    before = keys_of(cache, request)
    after = keys_of(cache, replace(request, **{**change, "record": record}))
    shared = set(before) & set(after) - {"history"}
    assert {name for name in shared if before[name] != after[name]} == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("train/00000001.mp4", {"clip", "reference"}),
        ("control/00000001.mp4", {"control"}),
        ("wav/00000001.wav", {"audio"}),
    ],
)
def test_a_changed_byte_of_a_file_changes_exactly_what_reads_it(
    file: str, expected: set[str], copied: Path, cache: Cache
) -> None:
    request = request_for(S2V, copied)
    before = keys_of(cache, request)
    times = (copied / file).stat()
    content = bytearray((copied / file).read_bytes())
    content[-1] ^= 1
    (copied / file).write_bytes(content)
    os.utime(copied / file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as careful tools set it back
    assert changed(before, keys_of(cache, request)) == expected


def test_the_name_of_a_file_does_not_matter(copied: Path, cache: Cache) -> None:
    before = keys_of(cache, request_for(S2V, copied))
    copied.rename(copied.with_name("moved"))
    assert not changed(before, keys_of(cache, request_for(S2V, copied.with_name("moved"))))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("Wan2.1_VAE.pth", PIXELS),
        ("models_t5_umt5-xxl-enc-bf16.pth", {"text"}),
        ("google/umt5-xxl/tokenizer.json", {"text"}),
        ("wav2vec2-large-xlsr-53-english/preprocessor_config.json", {"audio"}),
    ],
)
def test_a_changed_byte_of_an_encoder_changes_exactly_what_it_encodes(
    part: str, expected: set[str], cache: Cache, tmp_path: Path
) -> None:
    request = request_for(S2V, key=SampleKey(seed=1, epoch=0, row=3))
    options = adapter_options(config_of(S2V), torch.device("cpu"))
    shutil.copytree(options.model_dir, tmp_path / "model")
    moved = replace(options, model_dir=tmp_path / "model")
    before = keys_of(Cache.for_encoders(cache.root, adapter_of(S2V).encoders_of(moved)), request)
    assert before == keys_of(cache, request)
    with (tmp_path / "model" / part).open("ab") as file:
        file.write(b"\n")
    after = keys_of(Cache.for_encoders(cache.root, adapter_of(S2V).encoders_of(moved)), request)
    assert changed(before, after) - {"history"} == expected


def test_another_precision_of_the_encoders_is_another_entry(cache: Cache) -> None:
    request = request_for(S2V)
    options = replace(adapter_options(config_of(S2V), torch.device("cpu")), compute_dtype=torch.bfloat16)
    other = Cache.for_encoders(cache.root, adapter_of(S2V).encoders_of(options))
    assert "audio" not in changed(keys_of(cache, request), keys_of(other, request))  # float32 always
    assert changed(keys_of(cache, request), keys_of(other, request)) >= {*PIXELS, "text"}


def filled(cache: Cache, output: Any = None) -> tuple[str, Path]:
    key = "ab" * 16
    cache.write(key, output or {"mean": torch.arange(6.0).view(2, 3), "std": torch.ones(())})
    return key, cache.path(key)


@pytest.mark.parametrize("harm", ["cut", "bit", "empty"])
def test_a_damaged_entry_is_reported_and_made_again(harm: str, cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    key, path = filled(cache)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"cut": content[:-3], "bit": content, "empty": b""}[harm])
    assert cache.read(key) is None and not path.exists()
    assert str(path) in capfd.readouterr().err
    filled(cache)
    found = cache.read(key)
    assert found is not None and torch.equal(found["mean"], torch.arange(6.0).view(2, 3))


def test_prune_keeps_what_is_wanted_and_what_is_being_written(cache: Cache) -> None:
    key, path = filled(cache)
    cache.write("cd" * 16, {"states": torch.ones(2)})
    young, old = path.with_name(".young.1"), path.with_name(".old.1")
    young.write_bytes(b"x")
    old.write_bytes(b"x")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    prune(cache.root, {key})
    assert list(entries(cache.root)) == [path] and list(partials(cache.root)) == [young]


def test_a_cache_that_cannot_be_written_says_so(cache: Cache, tmp_path: Path) -> None:
    (cache.root / "entries").parent.mkdir(parents=True, exist_ok=True)
    (cache.root / "entries").write_text("a file in its place")
    with pytest.raises(EnvironmentFault, match="cannot write") as caught:
        filled(cache)
    assert "--cache" in str(caught.value.hint)


def fill(folder: Path, *more: str) -> "subprocess.Popen[str]":
    argv = [
        sys.executable, "-m", "vfun_cli", "cache", "wan-s2v", "--demo", "--cache", str(folder), "--strategy", "single",
        "--max-train-steps", "6", "--cache-variants", "2", "--video-sample-size", "96", "--image-sample-size", "96",
        "--token-sample-size", "96", *more,
    ]  # fmt: skip
    marked = os.environ | {"CACHE_TEST": str(folder)}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=marked)


def whole(job: "subprocess.Popen[str]", code: int = 0) -> str:
    said, _ = job.communicate(timeout=300)
    assert job.returncode == code, said
    return said


def contents(folder: Path) -> dict[str, dict[str, list[float]]]:
    return {
        path.name: {name: tensor.flatten().tolist() for name, tensor in read_entry(path).items()}
        for path in entries(folder)
    }


@pytest.mark.slow
def test_two_fills_at_once_and_one_that_is_killed_leave_a_whole_cache(workplace: Path, tmp_path: Path) -> None:
    config_of(S2V)
    whole(fill(tmp_path / "alone"))
    expected = contents(tmp_path / "alone")
    shared = tmp_path / "shared"
    killed = fill(shared)
    deadline = time.monotonic() + 200
    while not any(entries(shared)):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    kill_all(shared)
    killed.communicate()
    survived = contents(shared)  # every one of them is whole
    assert all(expected[name] == content for name, content in survived.items())

    one, two = fill(shared), fill(shared)
    whole(one)
    whole(two)
    assert contents(shared) == expected
    assert "0 clips encoded" in whole(fill(shared))
    assert f"{len(expected)} entries, all whole" in whole(fill(shared, "--verify"))


def kill_all(folder: Path) -> None:
    """Every process of the fill, wherever it moved to: they inherit a mark."""
    mark = f"CACHE_TEST={folder}".encode()
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue
