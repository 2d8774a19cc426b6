"""The dependency rules of the architecture, read from the code's own imports."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import vfun_process
from tests.sources import PACKAGE, parsed
from vfun_cli.demo.default import BUILDERS
from vfun_cli.families import FAMILIES
from vfun_cli.run.rundir import RunDir

HEAVY = {"torch", "accelerate", "deepspeed", "diffusers", "transformers", "peft", "decord"}
TRAINING_PLANE = (
    "training/",
    "sampling/",
    "encoding/",
    "modeling/",
    "demo/",
    "control/depth.py",
    "acceptance/rank.py",
    "acceptance/step_memory.py",
    "forecast/measuring/",
)
SHARED_BY_FAMILIES = ("vfun_cli.families.spec", "vfun_cli.families.documented")
FAMILY_TORCH_MODULES = {"adapter.py", "transformer.py"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def top_level_imports(path: Path) -> set[str]:
    """Names imported when the module is imported, `if TYPE_CHECKING` blocks left out."""
    names: set[str] = set()
    for node in parsed(path).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def all_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def in_training_plane(relative: str) -> bool:
    if relative in ("demo/__init__.py", "demo/default.py", "demo/tour.py"):
        return False
    if relative.startswith("families/"):
        return Path(relative).name in FAMILY_TORCH_MODULES
    return relative.startswith(TRAINING_PLANE)


def test_heavy_packages_are_imported_by_the_training_plane_alone() -> None:
    checked = 0
    for path in modules():
        relative = path.relative_to(PACKAGE).as_posix()
        if in_training_plane(relative):
            continue
        heavy = {name for name in top_level_imports(path) if name.split(".")[0] in HEAVY}
        assert not heavy, f"{relative} imports {heavy} at module level"
        checked += 1
    assert checked > 20


ROOMS = (
    ("errors",),
    ("console",),
    ("children",),
    ("devices",),
    ("disks",),
    ("files",),
    ("imports",),
    ("lfs",),
    ("shipped",),
    ("typed_json",),
    ("metadata", "checkpoints"),
    ("run",),
    ("modeling",),
    ("families",),
    ("config", "control", "encoding", "hub"),
    ("demo",),
    ("plan", "scripts"),
    ("sampling",),
    ("launch", "training"),
    ("forecast",),
    ("acceptance", "report"),
    ("commands",),
    ("main",),
    ("entry",),
    ("__main__",),
)
"""From the ground up. A room may import those of lower floors, none beside it and none above."""

FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def named_modules(path: Path) -> set[str]:
    """Every module that the file names: in imports, at the top or inside functions, and as text to be imported."""
    names = all_imports(path)
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.fullmatch(r"(vfun_cli(?:\.\w+)+):\w+", node.value)  # module:attribute
            names |= {found[1]} if found else set()
    return names


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in modules()} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_nothing_imports_from_a_room_beside_or_above_it(room: str) -> None:
    inside = [path for path in modules() if room_of(path) == room]
    for path in inside:
        for name in named_modules(path):
            parts = name.split(".")
            other = parts[1] if parts[0] == "vfun_cli" and len(parts) > 1 else None
            if other in FLOORS and other != room:
                assert FLOORS[other] < FLOORS[room], f"{path.relative_to(PACKAGE)} imports {name}"
    assert inside


def test_a_family_imports_no_other_family() -> None:
    checked = 0
    for path in (PACKAGE / "families").glob("*/*.py"):
        own = f"vfun_cli.families.{path.parent.name}"
        for name in all_imports(path):
            if name.startswith("vfun_cli.families."):
                assert name.startswith((own, *SHARED_BY_FAMILIES)), f"{path} imports {name}"
        checked += 1
    assert checked >= 10


def test_everything_else_reaches_families_through_their_spec_alone() -> None:
    public = ("find", "stated_in", "FAMILIES", "adapter_of", "detect", "given", "releases", "trained")
    known = (*SHARED_BY_FAMILIES, *(f"vfun_cli.families.{name}" for name in public))
    for path in modules():
        if room_of(path) in ("families", "demo"):
            continue
        for name in all_imports(path):
            if name.startswith("vfun_cli.families."):
                assert name.startswith(known), f"{path}: {name}"


def test_no_module_outside_families_branches_on_a_family_name() -> None:
    for path in modules():
        relative = path.relative_to(PACKAGE).as_posix()
        if relative.startswith(("families/", "demo/")):
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert "family ==" not in text and "spec.name ==" not in text, f"{relative}: {text}"


LIGHT = [
    ["--help"],
    ["train", "--help"],
    ["train"],
    ["train", "no-family"],
    ["train", "wan-s2v", "--no-option"],
    ["train", "wan-s2v", "--learning-rate", "x"],
    ["train", "wan-s2v", "--fsdp", "--zero2"],
    ["train", "wan-s2v", "--zero3", "--compile"],
    ["lora", "wan-s2v", "--zero3", "--use-dora"],
    ["train", "wan-s2v", "--num-processes", "9999"],
    ["train", "wan-s2v", "--resume-from-checkpoint", "latest"],
    ["train", "wan-s2v", "--output-dir", "used"],
    ["train", "wan-s2v", "--train-data-meta", "none.json"],
    ["resume"],
    ["resume", "none"],
    ["cache", "wan-s2v"],
    ["cache", "wan-s2v", "--cache", "none", "--verify"],
    ["plan-buckets", "wan-s2v", "--meta", "none.json"],
    ["import"],
    ["import", "none.sh"],
    ["validate-meta"],
    ["validate-meta", "none.json", "--family", "wan-s2v"],
    ["export-bf16", "checkpoint-9"],
    ["checkpoints", "ls", "none"],
    ["checkpoints", "verify", "none"],
    ["checkpoints", "diff", "none", "none"],
    ["report", "--help"],
    ["report"],
    ["report", "none"],
    ["generate", "--help"],
    ["generate"],
    ["generate", "none", "--prompt", "a kite"],
    ["generate", "--meta", "rows.json", "--prompt", "a kite"],
    ["generate", "--steps", "many"],
    ["acceptance", "--list"],
    ["acceptance", "--only", "no such row"],
]
"""Help, and what is refused before there is anything to plan, read or export."""


def loaded(commands: list[list[str]], folder: Path, packages: set[str]) -> list[tuple[str, set[str]]]:
    """The commands of a process, one after another, and which of the packages are loaded when each ends."""
    script = (
        "import json, sys\nfrom vfun_cli.main import main\n"
        f"for arguments in {commands!r}:\n"
        "    try:\n        main(arguments)\n    except SystemExit:\n        pass\n"
        f"    print('\\nLOADED', json.dumps([arguments, sorted(set({sorted(packages)!r}) & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=True)
    told = [json.loads(line.removeprefix("LOADED")) for line in done.stdout.splitlines() if line.startswith("LOADED")]
    return [(" ".join(arguments), set(found)) for arguments, found in told]


def test_help_and_refusals_load_neither_numpy_nor_heavy_packages(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "run.json").write_text("{}")
    found = loaded(LIGHT, tmp_path, HEAVY | {"numpy"})
    assert len(found) == len(LIGHT)
    for command, packages in found:
        assert not packages, command


def test_a_plan_loads_no_heavy_packages(tmp_path: Path) -> None:
    assert loaded([["plan-buckets", "wan-s2v"]], tmp_path, HEAVY | {"numpy"}) == [("plan-buckets wan-s2v", {"numpy"})]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "expected"), [("single", False), ("zero2", True)])
def test_ranks_load_deepspeed_for_its_own_strategies_alone(
    strategy: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes half a second of the start of each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    run = RunDir(tmp_path / "run")
    vfun_process(
        "train", "cogvideox-fun", "--demo", "--device=cpu", f"--strategy={strategy}", "--num-processes=1",
        "--max-train-steps=1", "--report-to=none", f"--output-dir={run.root}", code=0,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in run.launcher_log().read_text().splitlines()}
    assert "diffusers" in imported and ("deepspeed" in imported) == expected


def test_every_family_has_a_demo() -> None:
    assert set(BUILDERS) == set(FAMILIES)
