"""Every command that the README prints runs as it is printed there."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.jobs import vfun_process
from vfun_cli import families
from vfun_cli.demo import default as demo_default

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks() -> list[list[str]]:
    """Lines of the README's sh blocks."""
    return [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]


def starts_training(line: str) -> bool:
    return re.match(r"vfun (train|lora|resume|export-bf16|generate) ", line) is not None and "--dry-run" not in line


@pytest.fixture(scope="module")
def customer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data where the published command lines' variables say they are."""
    folder = tmp_path_factory.mktemp("customer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        demo_default.make(families.find("wan-s2v"))
    demo = folder / "vfun-demo" / "wan-s2v"
    shutil.copytree(demo / "model", folder / "models/Diffusion_Transformer/Wan2.2-S2V-14B")
    data = folder / "datasets/internal_datasets"
    shutil.copytree(demo / "data", data)
    for row in json.loads((data / "metadata.json").read_text(encoding="utf-8"))[:4]:
        clip = folder / "clips" / Path(row["file_path"]).name
        clip.parent.mkdir(exist_ok=True)
        shutil.copyfile(data / row["file_path"], clip)
        shutil.copyfile(data / row["audio_path"], clip.with_suffix(".wav"))
        shutil.copyfile(data / row["control_file_path"], clip.with_stem(f"{clip.stem}_control"))
        clip.with_suffix(".txt").write_text(row["text"], encoding="utf-8")
    (data / "metadata.json").rename(data / "metadata_control.json")
    return folder


def run_block(lines: list[str], folder: Path, patch: pytest.MonkeyPatch) -> int:
    patch.chdir(folder)
    patch.setenv("OMP_NUM_THREADS", "1")
    ran = 0
    for line in lines:
        line, _, target = line.partition(" > ")
        words = shlex.split(line, comments=True)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            patch.setitem(os.environ, name, value)
            continue
        assert words[0] == "vfun", line
        said = vfun_process(*words[1:])
        assert said.code == 0, f"$ {line}\n{said.err}"
        if target:
            Path(target).write_text(said.out, encoding="utf-8")
        ran += 1
    return ran


@pytest.mark.slow
def test_commands_that_start_nothing_run_as_printed(customer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = [block for block in blocks() if not any(map(starts_training, block))]
    assert sum(run_block(block, customer, monkeypatch) for block in quick) >= 5


@pytest.mark.slow
def test_commands_that_train_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = [block for block in blocks() if any(map(starts_training, block))]
    assert sum(run_block(block, tmp_path, monkeypatch) for block in training) >= 4


def test_every_family_and_strategy_is_named() -> None:
    for name in [*families.FAMILIES, "--ddp", "--fsdp", "--zero2", "--zero3", "--zero3-offload"]:
        assert f"`{name}`" in README, name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_the_families_page_says_what_each_makes_videos_from_and_how() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    table = page[page.index("\n## Videos\n") :]
    for name, spec in families.FAMILIES.items():
        made = spec.sampling
        needed, more = ([f"`--{each.replace('_', '-')}`" for each in given] for given in (made.required, made.optional))
        cells = (
            f"`{name}`",
            ", ".join(["`--prompt`", *needed]),
            ", ".join(more),
            f"{made.frames}{' a segment' * made.by_sound}",
            f"{made.size[0]} x {made.size[1]}",
            f"{made.fps}",
            f"{made.steps}",
            f"{made.guidance:g}",
        )
        assert f"\n| {' | '.join(cells)} |\n".replace("  ", " ") in table, cells


def test_the_families_page_has_a_row_for_every_family_in_each_table() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    for name, spec in families.FAMILIES.items():
        rows = re.findall(rf"^\| `{re.escape(name)}` \|.*", page, re.MULTILINE)
        assert len(rows) >= 2, name
        assert all(kind in rows[0] for kind in spec.media_types), name
        assert all(f"`{field.name}`" in rows[0] for field in spec.fields if field.name != "file_path"), name
