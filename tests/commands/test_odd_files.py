"""Files that somebody edited, cut or made up: every command says which is damaged, at once, and exits with 5."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.commands.conftest import Vfun
from tests.written_runs import FAMILY, write_run
from vfun_cli.checkpoints import manifest
from vfun_cli.typed_json import DEEPEST

pytestmark = pytest.mark.slow

FULL, LORA = Path("full/checkpoint-4"), Path("lora/checkpoint-4")
MODEL = Path(f"vfun-demo/{FAMILY}/model")
DEEP = "[" * 100_000 + "]" * 100_000
SLOWEST = 20
"""Seconds after which a command counts as hanging; none takes one."""

EXPORT = ("export-bf16", str(FULL), "--output", "out")
EXPORT_LORA = ("export-bf16", str(LORA), "--output", "out")
RESUME = ("resume", str(FULL), "--dry-run", "--json")
START = ("lora", FAMILY, "--demo", "--rank", "2", "--network-path", str(LORA), "--dry-run", "--output-dir", "new")
PLAN = ("plan-buckets", FAMILY, "--demo")
VERIFY = ("checkpoints", "verify", str(FULL))


@pytest.fixture(scope="module")
def written(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, and a run of each kind on it; never changed."""
    folder = tmp_path_factory.mktemp("odd") / "files"
    shutil.copytree(pristine, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_run("train", Path("full"))
        write_run("lora", Path("lora"))
    return folder


@pytest.fixture
def place(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of them, as the working directory; what hangs is ended."""
    folder = shutil.copytree(written, tmp_path / "place")
    monkeypatch.chdir(folder)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SLOWEST)
    yield folder
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def give_up(*_: object) -> None:
    raise TimeoutError("it hangs")


def setting(*path: Any, to: Any) -> Callable[[str], str]:
    """Change one value inside a JSON."""

    def change(text: str) -> str:
        content = value = json.loads(text)
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to
        return json.dumps(content)

    return change


def without(*path: Any) -> Callable[[str], str]:
    """Remove one value of a JSON."""

    def change(text: str) -> str:
        content = value = json.loads(text)
        for key in path[:-1]:
            value = value[key]
        del value[path[-1]]
        return json.dumps(content)

    return change


def deep(text: str) -> str:
    """A JSON with a value inside thousands of lists."""
    return text.replace("{", '{"note": ' + DEEP + ",", 1)


def renamed(new: str) -> Callable[[str], str]:
    """A manifest with another file's name."""

    def change(text: str) -> str:
        content = json.loads(text)
        content["files"][new] = content["files"].pop("state.json")
        return json.dumps(content)

    return change


RUN, STATE, MANIFEST = Path("full/run.json"), FULL / "state.json", FULL / "manifest.json"
ADAPTER, CONFIG = LORA / "model/adapter_config.json", MODEL / "transformer/config.json"

ODD: list[tuple[Path, Callable[[str], str], tuple[str, ...]]] = [
    *((RUN, without(name), RESUME) for name in ("command", "family", "config", "metadata_sha256")),
    *((RUN, setting("config", name, to=None), RESUME) for name in ("num_processes", "gradient_accumulation_steps")),
    *((RUN, setting("config", "learning_rate", to=value), RESUME) for value in ("x", 10**400, float("nan"), {"a": 1})),
    (RUN, setting("config", "train_data_dir", to="a\0b"), RESUME),
    *((RUN, setting("config", name, to="x" * 300), RESUME) for name in ("pretrained_model_name_or_path", "vae_path")),
    (RUN, setting("family", to="none"), RESUME),
    (RUN, deep, RESUME),
    (RUN, lambda text: "[]", RESUME),
    (STATE, setting("step", to=10**30), RESUME),
    (STATE, setting("layouts", to=[{"until": 1}]), RESUME),
    (STATE, setting("run_config", to=[]), EXPORT),
    (STATE, setting("run_config", "pretrained_model_name_or_path", to=7), EXPORT),
    (STATE, setting("run_config", "train_mode", to=[1, 2]), EXPORT),
    (STATE, setting("run_config", "transformer_path", to="a/" + "x" * 300), EXPORT),
    (STATE, setting("family", to="none"), EXPORT),
    (STATE, deep, EXPORT),
    (STATE, without("world_size"), VERIFY),
    (MANIFEST, setting("files", "state.json", "bytes", to="4"), VERIFY),
    (MANIFEST, setting("files", to=[]), RESUME),
    (MANIFEST, renamed("a\0b"), VERIFY),
    (MANIFEST, renamed("\ud800"), VERIFY),
    (MANIFEST, renamed("/etc/passwd"), VERIFY),
    (MANIFEST, deep, EXPORT),
    (ADAPTER, setting("lora_alpha", to=None), EXPORT_LORA),
    (ADAPTER, setting("lora_alpha", to=[1, 2]), EXPORT_LORA),
    (ADAPTER, setting("lora_alpha", to=10**400), START),
    (ADAPTER, setting("alpha_pattern", to=[]), START),
    (ADAPTER, setting("alpha_pattern", to={"(.*.*)*x": 2}), START),
    (ADAPTER, setting("alpha_pattern", to={"(([a-z0-9_.])+)+$x": 2}), START),
    (ADAPTER, deep, EXPORT_LORA),
    (CONFIG, setting("num_layers", to=10**30), PLAN),
    (CONFIG, setting("patch_size", to=0), PLAN),
    (CONFIG, setting("num_attention_heads", to=[1]), PLAN),
    (CONFIG, setting("max_text_seq_length", to=-1), PLAN),
    (CONFIG, deep, PLAN),
]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_an_odd_file_is_named(number: int, place: Path, vfun: Vfun) -> None:
    file, change, command = ODD[number]
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    if file.name != manifest.MANIFEST and "checkpoint-4" in file.parts:
        manifest.write_manifest(Path(*file.parts[:2]))
    said = vfun(*command)
    assert said.code == 5, said.err
    assert file.name in said.err and "fault of vfun" not in said.err, said.err
    assert not Path("out").exists()


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A safetensors file with another header before the same bytes."""

    def changed(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        table = json.loads(content[8 : 8 + length])
        found = change(table)
        text = found if isinstance(found, bytes) else json.dumps(table).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return changed


def entry(**fields: Any) -> Callable[[bytes], bytes]:
    return header(lambda table: table[max(table)].update(fields))


def name(new: str) -> Callable[[bytes], bytes]:
    return header(lambda table: table.update({new: table.pop(max(table))}))


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "offsets that are no whole numbers": entry(data_offsets=[0.5, 16.5]),
    "negative offsets": entry(data_offsets=[-64, 0]),
    "huge offsets": entry(data_offsets=[2**70, 2**70 + 64]),
    "one offset": entry(data_offsets=[0]),
    "offsets of another tensor": entry(data_offsets=[0, 16]),
    "a shape of text": entry(shape="2"),
    "a shape whose size overflows": entry(shape=[0, 2**60, 2**60]),
    "a type that is a list": entry(dtype=["F32"]),
    "NUL in a name": name("a\0b"),
    "half a character in a name": name("\ud800"),
    "a tensor that is a number": header(lambda table: table.update({max(table): 7})),
    "metadata that is a list": header(lambda table: table.update({"__metadata__": []})),
    "a name twice": header(lambda table: json.dumps(table)[:-1].encode() + b', "x": 1, "x": 2}'),
    "lists in lists": header(lambda table: b'{"a": ' + DEEP.encode() + b"}"),
    "no object": header(lambda table: b"[]"),
    "a length beyond the file": lambda content: (2**62).to_bytes(8, "little") + content[8:],
    "bytes behind the last tensor": lambda content: content + b"\0\0",
}


@pytest.mark.parametrize("case", HEADERS)
def test_an_odd_safetensors_header_is_named(case: str, place: Path, vfun: Vfun) -> None:
    for file, command in (
        (FULL / "model/model.safetensors", EXPORT),
        (LORA / "model/adapter_model.safetensors", START),
    ):
        file.write_bytes(HEADERS[case](file.read_bytes()))
        manifest.write_manifest(file.parents[1])
        said = vfun(*command)
        assert said.code == 5, said.err
        assert file.name in said.err and "fault of vfun" not in said.err, said.err


def test_an_alpha_of_two_numbers_is_named(place: Path, vfun: Vfun) -> None:
    pair = {"a.lora_down.weight": np.ones((2, 3), np.float32), "a.lora_up.weight": np.ones((3, 2), np.float32)}
    save_file(pair | {"a.alpha": np.ones(2, np.float32)}, "odd.safetensors")
    said = vfun(*START[:5], "--network-path", "odd.safetensors", "--dry-run", "--output-dir", "new")
    assert said.code == 5 and "odd.safetensors" in said.err and "a.alpha" in said.err, said.err


def test_values_nest_as_deep_as_is_said(place: Path, vfun: Vfun) -> None:
    whole = STATE.read_text()
    for levels, code in ((DEEPEST - 1, 0), (DEEPEST, 5)):
        STATE.write_text(whole.replace("{", '{"note": ' + "[" * levels + "]" * levels + ",", 1))
        manifest.write_manifest(FULL)
        assert vfun(*VERIFY).code == code


@pytest.mark.parametrize("name", ["checkpoint-" + "9" * 5000, "checkpoint-" + "9" * 200, "x" * 300])
def test_names_beyond_all_numbers_and_lengths_are_no_checkpoints(name: str, place: Path, vfun: Vfun) -> None:
    if len(name) < 255:
        Path("full", name).mkdir()
    for command in (
        ("resume", name),
        ("export-bf16", name),
        ("checkpoints", "verify", name),
        ("checkpoints", "ls", name),
    ):
        said = vfun(*command)
        assert said.code in (0, 5) and "fault of vfun" not in said.err, said.err
    assert vfun("checkpoints", "ls", "full").code == 0


# Exports ----------------------------------------------------------------------------------------------------------

SOURCES = [
    str(FULL), "full", "full/checkpoint-4/model", "full/checkpoint-4/new", "full/logs", "full/checkpoint-2",
    str(MODEL), str(MODEL / "transformer"), str(MODEL / "transformer/new"), "vfun-demo", ".", "/", "link", "link/new",
]  # fmt: skip


@pytest.mark.parametrize("output", SOURCES)
def test_an_export_leaves_its_sources_alone(output: str, place: Path, vfun: Vfun) -> None:
    Path("full/checkpoint-2").mkdir()
    Path("link").symlink_to(FULL.absolute())
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    for command in (("export-bf16", str(FULL)), ("export-bf16", str(LORA), "--merge")):
        if command[1] == str(LORA) and output.startswith(("full", "link")):
            continue
        said = vfun(*command, "--output", output, "--overwrite")
        assert said.code == 2 and "--output" in said.err, said.err
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_overwrite_replaces_an_export_and_nothing_else(place: Path, vfun: Vfun) -> None:
    assert vfun(*EXPORT).code == 0
    assert vfun(*EXPORT).code == 2
    assert vfun(*EXPORT, "--overwrite").code == 0
    Path("out/notes.json").write_text("{}")
    said = vfun(*EXPORT, "--overwrite")
    assert said.code == 2 and "notes.json" in said.err and Path("out/notes.json").exists(), said.err
    Path("loras").mkdir()
    shutil.copy2(LORA / "model/adapter_model.safetensors", "loras/precious.safetensors")
    said = vfun("export-bf16", str(LORA), "--format", "comfyui", "--output", "loras", "--overwrite")
    assert said.code == 2 and Path("loras/precious.safetensors").exists(), said.err


INSIDE = ("state.json", "manifest.json", "config/config.json", "model/model.safetensors", "model/optimizer.safetensors")
PIPES = [
    *((FULL / name, command) for name in INSIDE for command in (VERIFY, EXPORT, RESUME)),
    *((CONFIG, command) for command in (PLAN, RESUME)),
    (LORA / "model/adapter_model.safetensors", START),
]


@pytest.mark.parametrize(("file", "command"), PIPES)
def test_a_pipe_in_the_place_of_a_file_is_never_waited_for(
    file: Path, command: tuple[str, ...], place: Path, vfun: Vfun
) -> None:
    file.unlink()
    os.mkfifo(file)
    said = vfun(*command)
    assert said.code == 5 and ("not a regular file" in said.err or file.name in said.err), said.err


def test_a_pipe_in_the_place_of_a_run_is_none(place: Path, vfun: Vfun) -> None:
    RUN.unlink()
    os.mkfifo(RUN)
    assert "holds no run" in vfun(*RESUME).err


def test_outputs_that_no_disk_takes_are_refused_in_words(place: Path, vfun: Vfun) -> None:
    Path("file").write_text("x")
    for output, code in (("x" * 300, 2), ("file/out", 6), ("file", 2)):
        said = vfun("export-bf16", str(FULL), "--output", output, "--overwrite")
        assert said.code == code and "fault of vfun" not in said.err, said.err
    said = vfun(*EXPORT, "--max-shard-size", "9" * 400)
    assert said.code == 2 and "is not a size" in said.err, said.err


@pytest.mark.parametrize("file", ["model/model.safetensors", "config/config.json"])
def test_a_flipped_bit_in_what_is_exported_is_found(file: str, place: Path, vfun: Vfun) -> None:
    content = bytearray((FULL / file).read_bytes())
    content[-2] ^= 1
    (FULL / file).write_bytes(content)
    said = vfun(*EXPORT)
    assert said.code == 5 and Path(file).name in said.err and not Path("out").exists(), said.err


def test_a_deepspeed_folder_of_other_scripts_may_hold_any_folder(place: Path, vfun: Vfun) -> None:
    for layout in ("pytorch_model", "global_step10"):
        foreign = Path(f"foreign-{layout}")
        (foreign / layout).mkdir(parents=True)
        (foreign / layout / "mp_rank_00_model_states.pt").write_bytes(b"")
        (foreign / "model").mkdir()
        said = vfun("export-bf16", str(foreign))
        assert said.code == 5 and "manifest.json" not in said.err, said.err


def test_weights_of_the_demo_are_exported_as_they_were(place: Path, vfun: Vfun) -> None:
    said = vfun(*EXPORT, "--dtype", "fp32", "--json")
    assert json.loads(said.out)["verified"]
    exported = {k: v for file in Path("out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(np.array_equal(exported[k], v) for k, v in load_file(FULL / "model/model.safetensors").items())


def test_a_user_without_a_home_can_train(place: Path, vfun: Vfun, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is started under a number that no user has."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    said = vfun("train", "wan-s2v", "--demo", "--dry-run", "--output-dir", "elsewhere")
    assert said.code == 0, said.err
