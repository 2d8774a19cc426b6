"""The cache: nothing stale is ever taken, nothing half written counts."""

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.disks import file_system
from tests.jobs import Said, vfun_here
from vfun_cli import families
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.encoding import cache as cache_module
from vfun_cli.encoding.cache import Cache, read_entry
from vfun_cli.errors import CheckpointError, ConfigError, EnvironmentFault
from vfun_cli.families import adapter_of
from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.adapter import Inputs, SampleRequest
from vfun_cli.modeling.clips import frame_indices
from vfun_cli.modeling.encoders.frozen import Encoders
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.run.cachedir import entries, partials, prune, verify_entry
from vfun_cli.training.data.loader import MicroBatch, load_ahead
from vfun_cli.training.model import adapter_options

FAMILIES = tuple(families.FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of our own with the demos that the tests ask for."""
    folder, before = tmp_path_factory.mktemp("cache"), Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def config_of(spec: FamilySpec) -> Any:
    return _config_of(spec.name)


@functools.cache
def _config_of(family: str) -> Any:
    spec = families.find(family)
    return resolve("train", spec, {"mixed_precision": "no"}, demo=demo_default.make(spec), environ={}).config


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
        kind="video", frames=8 + spec.plan.first_frame_alone, height=64, width=64, stride=1, total_frames=40,
        fps=(16, 1),
    )  # fmt: skip
    return replace(asked, **changes)


def inputs_for(spec: FamilySpec, request: SampleRequest) -> Inputs:
    return adapter_of(spec).inputs(request, adapter_options(config_of(spec), spec, torch.device("cpu")))


PATHS = {"video": "train/00000001.mp4", "control": "control/00000001.mp4", "sound": "wav/00000001.wav"}
FRAME = {"size", "aspect", "start", "stride"}
"""What a picture from the clip depends on; the stride, because a longer span leaves other starts to draw from."""
CLIP = FRAME | {"frames"}
MADE_OF: dict[str, dict[str, tuple[str, set[str]]]] = {
    "wan-s2v": {
        "clip": ("vae", {"video", *CLIP}),
        "reference": ("vae", {"video", *FRAME}),
        "control": ("vae", {"control", *CLIP}),
        "history": ("vae", {"size", "aspect"}),
        "text": ("text", {"caption"}),
        "audio": ("speech", {"sound", "frames", "fps", "start", "stride"}),
    },
    "wan-fun-control": {
        "clip": ("vae", {"video", *CLIP}),
        "control": ("vae", {"control", *CLIP}),
        "picture": ("vae", {"video", *FRAME}),
        "image": ("clip", {"video", *FRAME}),
        "text": ("text", {"caption"}),
    },
    "hunyuanvideo-t2v": {
        "clip": ("vae", {"video", *CLIP}),
        "prompt": ("prompt", {"caption"}),
        "pooled": ("pooled", {"caption"}),
    },
    "hunyuanvideo-i2v": {
        "clip": ("vae", {"video", *CLIP}),
        "image": ("vae", {"video", *FRAME}),
        "prompt": ("prompt", {"caption", "video", *FRAME}),
        "pooled": ("pooled", {"caption"}),
    },
    "easyanimate-v5.1-control": {
        "clip": ("vae", {"video", *CLIP}),
        "control": ("vae", {"control", *CLIP}),
        "reference": ("vae", {"video", *FRAME}),
        "encoder_hidden_states": ("qwen2-vl", {"caption"}),
    },
    "easyanimate-v5-control": {
        "clip": ("vae", {"video", *CLIP}),
        "control": ("vae", {"control", *CLIP}),
        "encoder_hidden_states": ("bert", {"caption"}),
        "encoder_hidden_states_t5": ("t5", {"caption"}),
    },
    "cogvideox-fun": {
        "clip": ("vae", {"video", *CLIP}),
        "known": ("vae", {"video", *CLIP}),
        "text": ("text", {"caption"}),
    },
}
"""Of each input that is encoded: by which encoder, and what of the clip it depends on."""

WAN_FILES = {"Wan2.1_VAE.pth": "vae", "models_t5_umt5-xxl-enc-bf16.pth": "text", "google": "text"}
ENCODER_FILES: dict[str, dict[str, str]] = {
    "wan-s2v": {**WAN_FILES, "wav2vec2-large-xlsr-53-english": "speech"},
    "wan-fun-control": {**WAN_FILES, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "clip"},
    "hunyuanvideo-t2v": {
        "vae": "vae", "text_encoder": "prompt", "tokenizer": "prompt", "text_encoder_2": "pooled",
        "tokenizer_2": "pooled",
    },
    "hunyuanvideo-i2v": {
        "vae": "vae", "text_encoder": "prompt", "tokenizer": "prompt", "image_processor": "prompt",
        "text_encoder_2": "pooled", "tokenizer_2": "pooled",
    },
    "easyanimate-v5.1-control": {"vae": "vae", "text_encoder": "qwen2-vl", "tokenizer": "qwen2-vl"},
    "easyanimate-v5-control": {
        "vae": "vae", "text_encoder": "bert", "tokenizer": "bert", "text_encoder_2": "t5", "tokenizer_2": "t5",
    },
    "cogvideox-fun": {"vae": "vae", "text_encoder": "text", "tokenizer": "text"},
}  # fmt: skip
"""Of each encoder: the files and folders at the top of the model's directory."""

S2V = families.find("wan-s2v")


def encoders_from(spec: FamilySpec, model: Path | None = None) -> Encoders:
    options = adapter_options(config_of(spec), spec, torch.device("cpu"))
    return adapter_of(spec).encoders_of(replace(options, model_dir=model or options.model_dir))


def keys_of(cache: Cache, request: SampleRequest, spec: FamilySpec = S2V) -> dict[str, str]:
    inputs = adapter_of(spec).inputs(
        request, replace(adapter_options(config_of(spec), spec, torch.device("cpu")), control_ref_image="first_frame")
    )
    return {name: cache.key(each) for name, each in inputs.items() if each.encoder is not None}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert set(before) == set(after)
    return {name for name in before if before[name] != after[name]}


def affected(family: str, cause: str) -> set[str]:
    """The inputs that must be encoded again."""
    return {name for name, (encoder, causes) in MADE_OF[family].items() if cause == encoder or cause in causes}


def whole_request(spec: FamilySpec, folder: Path | None = None, *, late: bool = True) -> SampleRequest:
    """A clip that has all inputs of its family, of which nothing is dropped.

    It starts late in its file, so that a longer span moves it, or early.
    """
    return request_for(spec, folder, key=_whole_key(spec.name, late))


@functools.cache
def _whole_key(family: str, late: bool) -> SampleKey:
    spec = families.find(family)
    adapter, options = adapter_of(spec), adapter_options(config_of(spec), spec, torch.device("cpu"))
    for row in range(1000):
        request = request_for(spec, key=SampleKey(seed=1, epoch=0, row=row))
        if (frame_indices(request, spec.plan.usable_span)[0] >= 20) != late:
            continue
        inputs = adapter.inputs(request, options)
        read = [str(value) for name, value in request.record.items() if name != "type"]
        if {*MADE_OF[family]} <= {*inputs} and all(each in str(inputs) for each in read):
            return request.key
    raise AssertionError(f"no clip of {family} has all of {[*MADE_OF[family]]}")


@pytest.fixture
def copied(workplace: Path, tmp_path: Path) -> Path:
    """Demo data that a test may change."""
    root = Path(config_of(S2V).train_data_dir)
    shutil.copytree(root, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.for_encoders(tmp_path / "cache", encoders_from(S2V))


@pytest.mark.slow
def test_the_tables_name_every_family_and_every_input_that_is_encoded() -> None:
    assert {*MADE_OF} == {*ENCODER_FILES} == {*FAMILIES}
    for family in FAMILIES:
        spec = families.find(family)
        encoded = {name for name, each in inputs_for(spec, whole_request(spec)).items() if each.encoder is not None}
        assert encoded == {*MADE_OF[family]}, family
        assert {encoder for encoder, _ in MADE_OF[family].values()} == {*ENCODER_FILES[family].values()}, family


CHANGES = ("nothing", "caption", "size", "aspect", "frames", "fps", "stride", "start")


def with_change(change: str, request: SampleRequest, spec: FamilySpec) -> SampleRequest:
    latent = spec.plan.vae_stride[0]  # frames; the file is shorter by them too: as many starts to draw
    changes: dict[str, dict[str, Any]] = {
        "nothing": {},
        "caption": {"record": {**request.record, "text": "a blue circle moves"}},
        "size": {"height": 128, "width": 128},
        "aspect": {"width": 96},  # what is cropped from the frame follows from it
        "frames": {"frames": request.frames - latent, "total_frames": request.total_frames - latent},
        "fps": {"fps": (30000, 1001)},
        "stride": {"stride": 2},
        "start": {"key": whole_request(spec, late=False).key},
    }
    return replace(request, **changes[change])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_clip_changes_exactly_what_depends_on_it(family: str, change: str, tmp_path: Path) -> None:
    spec = families.find(family)
    cache = Cache.for_encoders(tmp_path, encoders_from(spec))
    request = whole_request(spec)
    before = keys_of(cache, request, spec)
    again = Cache.for_encoders(tmp_path, encoders_from(spec))
    assert changed(before, keys_of(again, with_change(change, request, spec), spec)) == affected(family, change)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "media"),
    [
        (family, media)
        for family in FAMILIES
        for media in PATHS
        if any(media in on for _, on in MADE_OF[family].values())
    ],
)
def test_a_changed_byte_of_a_file_changes_exactly_what_reads_it(family: str, media: str, tmp_path: Path) -> None:
    spec = families.find(family)
    shutil.copytree(config_of(spec).train_data_dir, tmp_path / "data")
    cache = Cache.for_encoders(tmp_path / "cache", encoders_from(spec))
    request = whole_request(spec, tmp_path / "data")
    before = keys_of(cache, request, spec)
    harm(tmp_path / "data" / PATHS[media])
    assert changed(before, keys_of(cache, request, spec)) == affected(family, media)


def harm(file: Path) -> None:
    """Another last byte, the times as careful tools set them back. JSON stays JSON."""
    times, content = file.stat(), file.read_bytes()
    file.write_bytes(content + b" " if file.suffix == ".json" else content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_byte_of_a_model_file_changes_exactly_what_its_encoder_makes(family: str, tmp_path: Path) -> None:
    spec = families.find(family)
    model = tmp_path / "model"
    shutil.copytree(config_of(spec).pretrained_model_name_or_path, model)
    request = whole_request(spec)
    before = keys_of(Cache.for_encoders(tmp_path / "cache", encoders_from(spec, model)), request, spec)
    assert before == keys_of(Cache.for_encoders(tmp_path / "cache", encoders_from(spec)), request, spec)
    met = set()
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        harm(file)
        after = keys_of(Cache.for_encoders(tmp_path / "cache", encoders_from(spec, model)), request, spec)
        part = file.relative_to(model).parts[0]
        encoder = ENCODER_FILES[family].get(part, "none: the transformer, the scheduler")
        assert changed(before, after) == affected(family, encoder), file
        met.add(part)
        before = after
    assert met > {*ENCODER_FILES[family]}  # those of the transformer, too


def test_the_name_of_a_file_does_not_matter(copied: Path, cache: Cache) -> None:
    before = keys_of(cache, request_for(S2V, copied))
    copied.rename(copied.with_name("moved"))
    assert not changed(before, keys_of(cache, request_for(S2V, copied.with_name("moved"))))


def test_another_precision_of_the_encoders_is_another_entry(cache: Cache) -> None:
    request = request_for(S2V)
    options = replace(adapter_options(config_of(S2V), S2V, torch.device("cpu")), compute_dtype=torch.bfloat16)
    other = Cache.for_encoders(cache.root, adapter_of(S2V).encoders_of(options))
    assert "audio" not in changed(keys_of(cache, request), keys_of(other, request))  # float32 always
    assert changed(keys_of(cache, request), keys_of(other, request)) >= {"clip", "reference", "control", "text"}


def filled(cache: Cache, output: Any = None) -> tuple[str, Path]:
    key = "ab" * 16
    cache.write(key, output or {"mean": torch.arange(6.0).view(2, 3), "std": torch.ones(())})
    return key, cache.path(key)


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "another"])
def test_a_damaged_entry_is_reported_and_made_again(harm: str, cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    key, path = filled(cache)
    content = bytearray(path.read_bytes())
    cache.write("cd" * 16, {"mean": torch.ones(2, 3), "std": torch.ones(())})  # of the same size
    another = cache.path("cd" * 16)
    content[-1] ^= 1
    path.write_bytes({"cut": content[:-3], "bit": content, "empty": b"", "another": another.read_bytes()}[harm])
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


def test_processes_of_one_number_on_two_hosts_write_apart(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are killed before they rename the same entry; what they leave is found, and deleted when it is old."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    left: set[Path] = set()

    def save_and_die(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, file, metadata)
        left.add(file)
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
            killing.setattr(cache_module, "save_tensors", save_and_die)
            filled(cache)
    assert len(left) == 2 and {*partials(cache.root)} == left and not [*entries(cache.root)]
    key, path = filled(cache)
    for age, remain in ((0, 2), (7200, 0)):
        for partial in left:
            os.utime(partial, (time.time() - age, time.time() - age))
        prune(cache.root, {key})
        assert len([*partials(cache.root)]) == remain and [*entries(cache.root)] == [path]


def test_a_cache_that_cannot_be_written_says_so(cache: Cache, tmp_path: Path) -> None:
    (cache.root / "entries").parent.mkdir(parents=True, exist_ok=True)
    (cache.root / "entries").write_text("a file in its place")
    with pytest.raises(EnvironmentFault, match="cannot write") as caught:
        filled(cache)
    assert "--cache" in str(caught.value.hint)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_an_entry_that_cannot_be_read_is_not_damaged_and_stays(
    code: int, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, or one on an ill disk."""
    key, path = filled(cache)
    whole, opened = path.read_bytes(), Path.open

    def refuse(file: Path, *arguments: Any, **named: Any) -> Any:
        if file == path:
            raise OSError(code, os.strerror(code), str(path))
        return opened(file, *arguments, **named)

    with monkeypatch.context() as refusing:
        refusing.setattr(Path, "open", refuse)
        with pytest.raises(EnvironmentFault, match=f"cannot read {path}: {os.strerror(code)}") as caught:
            cache.read(key)
        said = verify(cache.root)
        assert said.code == EnvironmentFault.exit_code and "damaged" not in said.err, said.err
        assert "--cache" in (caught.value.hint or "")
    assert path.read_bytes() == whole


def test_a_clip_is_not_skipped_for_an_entry_that_cannot_be_read(cache: Cache) -> None:
    """--on-bad-sample skip is for what cannot be decoded."""
    request, options = request_for(S2V), adapter_options(config_of(S2V), S2V, torch.device("cpu"))
    for key in keys_of(cache, request).values():
        path = cache.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()  # nothing that can be read, not even by root
    batches = iter([MicroBatch(epoch=0, step=0, index=0, requests=(request,))])
    with pytest.raises(EnvironmentFault, match="cannot read"):
        list(load_ahead(adapter_of(S2V), options, batches, 0, "skip", cache))


def test_a_full_disk_is_named_by_the_entry_that_it_cannot_take(tmp_path: Path) -> None:
    with file_system(tmp_path / "disk", "size=64k") as disk:
        cache = Cache.for_encoders(disk / "cache", encoders_from(S2V))  # remembers digests of files as long as it can
        with pytest.raises(EnvironmentFault, match=r"cannot write .*safetensors: No space left on device"):
            filled(cache, {"large": torch.zeros(100_000)})
        assert not [*partials(cache.root)] and not [*entries(cache.root)]


def verify(folder: Path, *more: str) -> Said:
    return vfun_here("cache", "wan-s2v", "--demo", "--cache", str(folder), "--verify", *more)


def test_verify_names_damaged_entries_and_leaves_them(cache: Cache) -> None:
    _, good = filled(cache)
    bad = cache.path("cd" * 16)
    bad.parent.mkdir()
    bad.write_bytes(good.read_bytes()[:-1] + b"x")
    said, as_json = verify(cache.root), verify(cache.root, "--json")
    assert said.code == as_json.code == CheckpointError.exit_code
    assert f"1 of 2 entries in {cache.root} are damaged" in said.err and str(bad) in said.err
    assert json.loads(as_json.out) == {"schema": 1, "cache": str(cache.root), "good": 1, "damaged": [str(bad)]}
    assert bad.exists()

    bad.unlink()
    said, as_json = verify(cache.root), verify(cache.root, "--json")
    assert said.code == as_json.code == 0
    assert said.out == "1 entries, all whole\n"
    assert json.loads(as_json.out) == {"schema": 1, "cache": str(cache.root), "good": 1, "damaged": []}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"])
def test_an_entry_is_whole_to_readers_with_and_without_torch(dtype: str, cache: Cache) -> None:
    values = torch.arange(6).to(getattr(torch, dtype))
    _, path = filled(cache, {"b": values.view(2, 3), "a": values[3].clone(), "none": values[:0].clone()})
    verify_entry(path)
    assert {*read_entry(path)} == {"a", "b", "none"}


@pytest.mark.slow
def test_verify_loads_no_torch(cache: Cache) -> None:
    _, good = filled(cache)
    bad = cache.path("cd" * 16)
    bad.parent.mkdir()
    bad.write_bytes(good.read_bytes()[:-1] + b"x")
    script = (
        "import sys\nfrom vfun_cli.main import main\n"
        f"try:\n    main(['cache', 'wan-s2v', '--demo', '--cache', {str(cache.root)!r}, '--verify', '--json'])\n"
        "except SystemExit as ended:\n    print(ended.code)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    content, code, torch_loaded = done.stdout.splitlines()
    assert json.loads(content)["damaged"] == [str(bad)]
    assert (code, torch_loaded) == ("5", "False")


def test_verify_of_what_is_no_cache_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("none", "file", "empty"):
        said = verify(tmp_path / name)
        assert said.code == ConfigError.exit_code and "there is no cache in" in said.err, name
    said = verify(tmp_path / "empty", "--prune")
    assert said.code == ConfigError.exit_code and "--prune" in said.err
