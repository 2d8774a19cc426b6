"""``vfun fetch`` against a hub on this machine, and the lines by which errors say how to get what is missing."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.commands.conftest import TRAINED, Vfun, digest
from tests.jobs import Said, vfun_here
from tests.sources import PACKAGE, parsed
from tests.tiny_hub import Hub, serving
from vfun_cli import families
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import CheckpointError
from vfun_cli.families import releases
from vfun_cli.families.detect import read_dims

FAMILY = "cogvideox-fun"
SPEC = families.find(FAMILY)
NOT_READ = ("README.md", "asset/1.mp4", "transformer/diffusion_pytorch_model.bin", "setup.py", "vae/readme.md")
MODEL = "vfun-demo/wan-s2v/model"
KEPT = 10 * 2**20
"""Bytes: huggingface_hub writes so many at a time."""
SMALL = "vae/config.json"
LARGE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the tiny model of a family and files that it does not read; vfun runs in an empty folder."""
    folder = tmp_path / "repository"
    shutil.copytree(pristine / "vfun-demo" / FAMILY / "model", folder)
    for name in NOT_READ:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not read")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serving(Hub(repository=SPEC.releases[0].hugging_face, folder=folder)) as serves:
        monkeypatch.setenv("HF_ENDPOINT", serves.address)
        monkeypatch.setattr(constants, "ENDPOINT", serves.address)  # of this process, which read the variable before
        yield serves


def fetch(*arguments: object) -> Said:
    return vfun_here("fetch", FAMILY, *arguments)


def fetch_by_variables(*arguments: object) -> Said:
    """In a process of its own: huggingface_hub reads its variables when it is imported."""
    command = [sys.executable, "-m", "vfun_cli", "fetch", FAMILY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Said(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, str]:
    return {name: value for name, value in digest(folder).items() if not name.startswith(".cache")}


def wanted(hub: Hub) -> dict[str, str]:
    unread = {*NOT_READ, "model_index.json"}
    return {name: value for name, value in digest(hub.folder).items() if name not in unread}


@pytest.mark.slow
def test_fetch_brings_what_the_family_reads_to_where_train_looks_for_it(hub: Hub) -> None:
    said = fetch_by_variables()
    assert said.code == 0, said.err
    folder = Path("models/Diffusion_Transformer/CogVideoX-Fun-2b-InP")
    assert str(folder) == SPEC.defaults.train["pretrained_model_name_or_path"]
    assert contents(folder) == wanted(hub)
    assert read_dims(SPEC, folder) and f"vfun train {FAMILY}" in said.err
    before = len(hub.fetched())
    assert fetch_by_variables().code == 0 and len(hub.fetched()) == before  # nothing comes twice


@pytest.mark.slow
def test_fetch_goes_on_within_a_file_where_the_connection_was_lost(hub: Hub) -> None:
    large = "tokenizer/large.model"
    (hub.folder / large).write_bytes(bytes(2 * KEPT + 4000))
    hub.breaks_at = large
    lost = fetch_by_variables("--to", "model")
    assert lost.code == 6 and "The same command goes on" in lost.err and "hf download" in lost.err, lost.err
    assert not Path("model", large).exists()
    hub.breaks_at, hub.asked = None, []
    assert fetch_by_variables("--to", "model").code == 0
    assert contents(Path("model")) == wanted(hub)
    assert [span for method, name, span in hub.asked if method == "GET" and name == large] == [f"bytes={KEPT}-"]
    assert not list(Path("model").rglob("*.part"))


@pytest.mark.slow
def test_fetch_replaces_a_file_that_was_cut_short_or_changed(hub: Hub) -> None:
    shutil.copytree(hub.folder, "model")
    Path("model", LARGE).write_bytes((hub.folder / LARGE).read_bytes()[:1000])
    changed = bytearray((hub.folder / SMALL).read_bytes())
    changed[5] ^= 1  # of the same size
    Path("model", SMALL).write_bytes(changed)
    said = fetch_by_variables("--to", "model", "--json")
    assert said.code == 0, said.err
    assert digest(Path("model")) == digest(hub.folder)
    assert set(hub.fetched()) == {LARGE, SMALL}
    assert json.loads(said.out)["repository"] == hub.repository


@pytest.mark.slow
def test_fetch_keeps_nothing_that_came_damaged(hub: Hub) -> None:
    hub.damages = LARGE
    said = fetch_by_variables("--to", "model")
    assert said.code == 6 and f"{LARGE} of {hub.repository} came damaged" in said.err, said.err
    assert not Path("model", LARGE).exists() and not list(Path("model").rglob("*.part"))


def test_a_dry_run_of_fetch_lists_and_brings_nothing(hub: Hub) -> None:
    said = fetch("--dry-run")
    assert said.code == 0 and LARGE in said.out and "README.md" not in said.out
    assert hub.asked == [] and not Path("models").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer/../../../evil.txt", "vae/../../x.safetensors"])
def test_fetch_writes_nothing_where_the_hub_names_a_file_outside(name: str, hub: Hub) -> None:
    hub.more_names = (name,)
    said = fetch("--to", "model")
    assert said.code == 6 and "no path inside" in said.err, said.err
    assert hub.asked == [] and not Path("model").exists()


REFUSALS = [
    (404, {"X-Error-Code": "RepoNotFound"}, "shows it to others only"),
    (403, {"X-Error-Code": "GatedRepo"}, "accept its terms"),
    (500, {}, "cannot be fetched"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("status", "headers", "words"), REFUSALS, ids=["not found", "gated", "broken"])
def test_fetch_says_what_the_hub_refuses(status: int, headers: dict[str, str], words: str, hub: Hub) -> None:
    hub.refusal = status, headers
    said = fetch("--to", "a model")
    assert said.code == 6 and words in said.err, said.err
    assert "--local-dir 'a model'" in said.err and "--local_dir 'a model'" in said.err


def test_fetch_begins_with_nothing_where_the_repository_lacks_a_part(hub: Hub) -> None:
    shutil.rmtree(hub.folder / "vae")
    said = fetch()
    assert said.code == 6 and "reads as VAE" in said.err, said.err
    assert hub.asked == [] and not Path("models").exists()


@pytest.mark.slow
def test_fetch_says_that_the_network_is_forbidden(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = fetch_by_variables()
    assert said.code == 6 and "HF_HUB_OFFLINE" in said.err and hub.asked == []


def test_fetch_needs_room_for_all_files_before_it_brings_one(hub: Hub) -> None:
    hub.sizes[LARGE] = 10**18
    said = fetch()
    assert said.code == 6 and "are free" in said.err, said.err
    assert hub.asked == [] and not Path("models").exists()


def test_fetch_leaves_the_folder_of_another_model_alone(hub: Hub, pristine: Path) -> None:
    shutil.copytree(pristine / "vfun-demo/wan-s2v/model", "other")
    before = digest(Path("other"))
    said = fetch("--to", "other")
    assert said.code == 2 and "wan-s2v" in said.err, said.err
    assert fetch("--to", "CogVideoX-Fun-5b-InP").code == 2
    assert digest(Path("other")) == before and hub.asked == []


def test_fetch_knows_the_sizes_of_a_family(vfun: Vfun) -> None:
    said = vfun("fetch", "wan-fun-control", "--size", "V1.1-1.3")
    assert said.code == 2 and "Did you mean 'V1.1-1.3B'?" in said.err
    assert releases.of_size(families.find("wan-fun-control"), "v1.1-1.3b").folder == "Wan2.1-Fun-V1.1-1.3B-Control"


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_release_is_named_as_its_published_directory(name: str) -> None:
    spec = families.find(name)
    assert releases.usual_directory(spec, spec.releases[0]) == Path(
        str(spec.defaults.train["pretrained_model_name_or_path"])
    )
    for release in spec.releases:
        assert releases.of_directory(spec, Path("somewhere", release.folder.lower())) is release
        assert re.fullmatch(r"[\w-]+/[\w.-]+", release.hugging_face)
    assert len({release.size.lower() for release in spec.releases}) == len(spec.releases)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_file_of_a_released_layout_is_fetched_and_every_missing_part_is_named(name: str, tmp_path: Path) -> None:
    spec = families.find(name)
    model = demo_default.make_model(spec, tmp_path)
    files = [str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()]
    assert [file for file in files if not releases.is_read(spec, file)] in ([], ["model_index.json"])
    assert releases.missing_parts(spec, model) == []
    for part, patterns in spec.files.items():
        broken = tmp_path / f"without {part}"
        shutil.copytree(model, broken)
        for file in files:
            if part in releases.parts_of(spec, broken, broken / file):
                (broken / file).unlink()
        with pytest.raises(CheckpointError) as missing:
            releases.require_parts(spec, broken)
        assert f"{part} (" in missing.value.message
        lines = [shlex.split(line) for line in (missing.value.hint or "").splitlines()[1:]]
        assert lines[0] == ["vfun", "fetch", name, "--to", str(broken)]
        included = [word for pattern in patterns for word in ("--include", pattern)]
        assert lines[1] == ["hf", "download", spec.releases[0].hugging_face, *included, "--local-dir", str(broken)]
        if spec.releases[0].model_scope:
            assert lines[2][:4] == ["modelscope", "download", "--model", spec.releases[0].model_scope]
            assert lines[2][4:] == ["--include", *patterns, "--local_dir", str(broken)]


@pytest.mark.slow
def test_the_lines_of_an_error_get_what_is_missing(hub: Hub, place: Path, vfun: Vfun) -> None:
    """The real ``hf`` of the line brings the part back, and no other."""
    model = place / "vfun-demo" / FAMILY / "model"
    shutil.rmtree(model / "vae")
    said = vfun("train", FAMILY, "--demo", "--dry-run")
    assert said.code == 5 and "VAE" in said.err, said.err
    lines = {line.split()[0]: shlex.split(line) for line in said.err.splitlines() if line.startswith("  ")}
    assert lines["vfun"] == ["vfun", "fetch", FAMILY, "--to", f"vfun-demo/{FAMILY}/model"]
    assert lines["modelscope"][-2:] == ["--local_dir", f"vfun-demo/{FAMILY}/model"]
    tool = Path(sys.executable).with_name("hf")
    done = subprocess.run([tool, *lines["hf"][1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(hub.fetched()) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert vfun("train", FAMILY, "--demo", "--dry-run").code == 0


DAMAGES = [
    ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model*.safetensors*"),
    ("config.json", "config.json"),
    ("Wan2.1_VAE.pth", "Wan2.1_VAE.pth"),
    ("google/umt5-xxl", "google/umt5-xxl/*"),
    ("wav2vec2-large-xlsr-53-english", "wav2vec2-large-xlsr-53-english/*.json"),
]


@pytest.mark.parametrize(("name", "pattern"), DAMAGES)
def test_what_is_missing_of_a_model_is_named_with_how_to_get_it(
    name: str, pattern: str, place: Path, vfun: Vfun
) -> None:
    path = place / "vfun-demo/wan-s2v/model" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = vfun("train", "wan-s2v", "--demo", "--dry-run")
    assert said.code == 5, said.err
    line = next(shlex.split(line) for line in said.err.splitlines() if line.startswith("  hf "))
    assert line[:3] == ["hf", "download", "Wan-AI/Wan2.2-S2V-14B"] and pattern in line
    assert len(line) < 12  # that part alone
    assert "  vfun fetch wan-s2v --to vfun-demo/wan-s2v/model" in said.err


@pytest.mark.slow
@pytest.mark.parametrize("command", [("train", "wan-s2v", "--demo", *TRAINED), ("generate", MODEL, "--demo")])
def test_what_only_loading_finds_missing_is_named_with_how_to_get_it(
    command: tuple[str, ...], place: Path, vfun: Vfun
) -> None:
    (place / MODEL / "wav2vec2-large-xlsr-53-english/model.safetensors").unlink()
    said = vfun(*command)
    assert said.code == 5, said.err
    line = next(shlex.split(line) for line in said.err.splitlines() if line.startswith("  hf "))
    assert line[3:5] == ["--include", "wav2vec2-large-xlsr-53-english/*.json"] and len(line) == 9


@pytest.mark.slow
def test_a_directory_that_is_not_there_is_got_by_the_lines_for_its_size(place: Path, vfun: Vfun) -> None:
    folder = "models/Diffusion_Transformer/Wan2.1-Fun-V1.1-1.3B-Control"
    said = vfun("train", "wan-fun-control", "--demo", "--pretrained-model-name-or-path", folder)
    assert said.code == 5, said.err
    assert "  vfun fetch wan-fun-control --size V1.1-1.3B\n" in said.err
    assert f"hf download alibaba-pai/{Path(folder).name} --include config.json" in said.err
    assert f"modelscope download --model PAI/{Path(folder).name} --include config.json" in said.err


@pytest.mark.slow
def test_one_module_alone_can_download() -> None:
    """All others would have to import a library of the hub, or open an address."""
    able = re.compile(r"(huggingface_hub|urllib\.request|urllib3|requests|httpx2?|http\.client|aiohttp|ftplib)\b")
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {str(path.relative_to(PACKAGE)) for name in names if able.match(name)}
    assert found == {"hub.py"}
