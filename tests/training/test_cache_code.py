"""Entries are made again when the code or a library that makes them has changed, and only then."""

import ast
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from live_models import LiveModel

import vfun_cli
from tests.sources import parsed
from vfun_cli.encoding import cache as caches
from vfun_cli.encoding.cache import Cache
from vfun_cli.families import adapter_of
from vfun_cli.training.model import adapter_options

LIVE = Callable[[str], LiveModel]
ALL = {"wan-s2v": {"clip", "reference", "control", "text", "audio"}, "cogvideox-fun": {"clip", "known", "text"}}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package that a test may change; the cache reads the source there."""
    package = Path(vfun_cli.__file__).parent
    copied = tmp_path / "vfun_cli"
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] == "vfun_cli" and file is not None:
            monkeypatch.setattr(module, "__file__", str(copied / Path(file).relative_to(package)))
    monkeypatch.setattr(caches, "FAMILIES", copied / "families")
    yield copied
    monkeypatch.undo()
    forget()


def forget() -> None:
    caches.code_digest.cache_clear()
    caches.file_digest.cache_clear()


def keys(live: LiveModel, folder: Path) -> dict[str, str]:
    """Of one clip's inputs, as a process that starts now makes them."""
    forget()
    kind = adapter_of(live.spec)
    cache = Cache.for_encoders(folder, kind.encoders_of(adapter_options(live.config, live.spec, torch.device("cpu"))))
    for row in range(20):
        inputs = kind.inputs(live.request(row, 8, 64, 64), adapter_options(live.config, live.spec, torch.device("cpu")))
        if "history" not in inputs:
            break
    return {name: cache.key(each) for name, each in inputs.items() if each.encoder is not None}


def differing(live: LiveModel, folder: Path, change: Callable[[], object]) -> set[str]:
    before = keys(live, folder)
    change()
    after = keys(live, folder)
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize("family", ["wan-s2v", "cogvideox-fun"])
@pytest.mark.parametrize(
    "file",
    [
        "modeling/media/frames.py",
        "metadata/pictures.py",
        "metadata/upright.py",
        "modeling/weights.py",
        "modeling/inputs.py",
        "modeling/encoders/clip_vae.py",
    ],
)
def test_code_that_decodes_loads_or_encodes_changes_every_entry(
    family: str, file: str, live_model: LIVE, code: Path, tmp_path: Path
) -> None:
    live = live_model(family)
    assert differing(live, tmp_path, lambda: (code / file).open("a").write("\n# changed\n")) == ALL[family]


def imported_media_code(name: str) -> set[str]:
    """The modules that a module's decoding depends on, itself included."""
    path = Path(str(importlib.import_module(name).__file__))
    names = {node.module for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and node.module}
    rooms = ("vfun_cli.metadata.", "vfun_cli.modeling.media.")
    return {name}.union(*(imported_media_code(found) for found in names if found.startswith(rooms)))


def test_no_module_that_decodes_is_forgotten() -> None:
    readers = ("frames", "pictures", "sound")
    needed = set().union(*(imported_media_code(f"vfun_cli.modeling.media.{reader}") for reader in readers))
    carriers = {"vfun_cli.metadata.facts", "vfun_cli.modeling.media.faults"}  # what is said of a file, and its errors
    assert needed - carriers <= {module.__name__ for module in caches.SHARED_CODE}
    assert len(needed) > 8


@pytest.mark.parametrize(
    ("family", "file", "expected"),
    [
        ("wan-s2v", "families/wan_s2v/adapter.py", {"audio"}),  # it loads the speech encoder itself
        ("wan-s2v", "families/wan_s2v/transformer.py", set()),
        ("cogvideox-fun", "families/cogvideox_fun/transformer.py", {"known"}),  # an input of the family's own
        ("cogvideox-fun", "families/wan_s2v/adapter.py", set()),
        ("wan-s2v", "training/trainer.py", set()),
    ],
)
def test_code_that_makes_one_kind_of_entry_changes_that_kind(
    family: str, file: str, expected: set[str], live_model: LIVE, code: Path, tmp_path: Path
) -> None:
    live = live_model(family)
    assert differing(live, tmp_path, lambda: (code / file).open("a").write("\n# changed\n")) == expected


@pytest.mark.parametrize(("release", "changes"), [("99.1.0", True), ("{major}.{minor}.99+cu999", False)])
@pytest.mark.parametrize("library", ["torch", "transformers", "av"])
def test_another_release_of_a_library_makes_other_entries_and_a_patch_does_not(
    library: str, release: str, changes: bool, live_model: LIVE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, versions = live_model("wan-s2v"), caches.version
    major, minor = versions(library).split(".")[:2]
    pretended = release.format(major=major, minor=minor)

    def install() -> None:
        monkeypatch.setattr(caches, "version", lambda name: pretended if name == library else versions(name))

    assert differing(live, tmp_path, install) == (ALL["wan-s2v"] if changes else set())
