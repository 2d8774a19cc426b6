"""The dependency rules of the architecture, read from the code's own imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vfun_cli"
HEAVY = {"torch", "accelerate", "deepspeed", "diffusers", "transformers", "peft", "decord"}
TRAINING_PLANE = ("training/", "demo/")
SHARED_BY_FAMILIES = ("vfun_cli.families.spec", "vfun_cli.families.documented")
FAMILY_TORCH_MODULES = {"adapter.py", "transformer.py"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def top_level_imports(path: Path) -> set[str]:
    """Names imported when the module is imported, `if TYPE_CHECKING` blocks left out."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def all_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


def test_a_family_imports_neither_another_family_nor_trainer_nor_config() -> None:
    checked = 0
    for path in (PACKAGE / "families").rglob("*.py"):
        parts = path.relative_to(PACKAGE / "families").parts
        if len(parts) < 2:
            continue
        own = f"vfun_cli.families.{parts[0]}"
        for name in all_imports(path):
            assert not name.startswith(("vfun_cli.training.trainer", "vfun_cli.config.options")), f"{path}: {name}"
            if name.startswith("vfun_cli.families."):
                assert name.startswith((own, "vfun_cli.families.spec", "vfun_cli.families.documented")), (
                    f"{path} imports {name}"
                )
        checked += 1
    assert checked >= 3


def test_only_commands_and_main_import_commands() -> None:
    for path in modules():
        relative = path.relative_to(PACKAGE).as_posix()
        if relative.startswith("commands/") or relative == "main.py":
            continue
        assert not any(name.startswith("vfun_cli.commands") for name in all_imports(path)), relative


def test_the_trainer_reaches_families_through_their_spec_alone() -> None:
    for path in (PACKAGE / "training").glob("*.py"):
        for name in all_imports(path):
            if name.startswith("vfun_cli.families."):
                assert name.startswith(("vfun_cli.families.spec", "vfun_cli.families.find")), f"{path}: {name}"


def test_no_module_outside_families_branches_on_a_family_name() -> None:
    for path in modules():
        relative = path.relative_to(PACKAGE).as_posix()
        if relative.startswith(("families/", "demo/")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert "family ==" not in text and "spec.name ==" not in text, f"{relative}: {text}"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train"], ["plan-buckets", "wan-s2v"]])
def test_the_control_plane_starts_without_heavy_packages(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import sys\nfrom vfun_cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
