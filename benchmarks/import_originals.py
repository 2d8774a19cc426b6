"""What ``vfun import`` makes of the launch scripts of the original trainers, in clones of them.

    python benchmarks/import_originals.py path/to/VideoX-Fun path/to/EasyAnimate

Every ``*.sh``, and every block of shell in a ``*.md`` that starts a training, of each clone. ``--smoke`` reads scripts
that it writes itself.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record

from vfun_cli.errors import VfunError
from vfun_cli.families import FAMILIES
from vfun_cli.scripts.launcher import launches
from vfun_cli.scripts.trainers import TRAINERS
from vfun_cli.scripts.translate import read_script, translate

BLOCK = re.compile(r"^[ ]*```\w+[ \t]*\r?\n(.*?)^[ ]*```[ ]*$", re.DOTALL | re.MULTILINE)
TRAINING = re.compile(r"(accelerate launch|torchrun|deepspeed|python3?) .*train\w*\.py")


def scripts(clone: Path, place: Path) -> Iterator[tuple[str, Path]]:
    """The scripts of a clone, by name; blocks of pages are written into ``place``."""
    for path in sorted(clone.rglob("*.sh")):
        yield str(path.relative_to(clone)), path
    for page in sorted(clone.rglob("*.md")):
        blocks = BLOCK.findall(page.read_text(encoding="utf-8", errors="replace"))
        for number, block in enumerate(blocks, start=1):
            if TRAINING.search(block):
                path = place / f"{len(list(place.iterdir()))}.sh"
                path.write_text(block, encoding="utf-8")
                yield f"{page.relative_to(clone)}, block {number}", path


def outcomes(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """What becomes of each launch of a script, in a word, and in full."""
    try:
        count = max(1, len(launches(read_script(path))))
    except VfunError as error:
        yield _kind(error), error.message
        return
    for number in range(1, count + 1):
        try:
            found = translate(path, number=number if count > 1 else None)
        except VfunError as error:
            yield _kind(error), error.message
            continue
        kind = "translated, with something refused" if found.refused else "translated"
        rows = Counter(row.outcome for row in found.rows)
        yield f"{kind}: vfun {found.command} {found.family}", f"{dict(rows)} {[row.vfun for row in found.refused]}"


def _kind(error: VfunError) -> str:
    for words in ("trains none of the models", "starts no training", "begins with"):
        if words in error.message:
            return f"refused: {words}"
    return "refused: something else"


def commit(clone: Path) -> str | None:
    asked = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def made_up(place: Path) -> Path:
    """A clone with one script of each trainer."""
    clone = place / "clone"
    clone.mkdir()
    for number, trainer in enumerate(TRAINERS):
        told = next(iter(trainer.values), "")
        flag = f"--{trainer.told_by}={told}" if trainer.told_by else ""
        text = f"accelerate launch scripts/{trainer.path} --pretrained_model_name_or_path=m --seed=1 {flag}\n"
        (clone / f"{number}.sh").write_text(text)
    return clone


def main() -> None:
    parser = record.parser("import_originals", __doc__)
    parser.add_argument("clones", nargs="*", type=lambda text: Path(text).absolute())
    given = parser.parse_args()
    result: dict[str, Any] = {"launches": 0, "translated": 0, "clones": {}}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for clone in [made_up(place)] if given.smoke else given.clones:
            blocks = place / f"blocks-{clone.name}"
            blocks.mkdir()
            counts: Counter[str] = Counter()
            for name, path in scripts(clone, blocks):
                for kind, words in outcomes(name, path):
                    counts[kind] += 1
                    print(f"{clone.name}/{name}: {kind}\n    {words}")
            result["clones"][clone.name] = {"commit": commit(clone), "outcomes": dict(sorted(counts.items()))}
            result["launches"] += counts.total()
            result["translated"] += sum(count for kind, count in counts.items() if kind.startswith("translated:"))
    named = {kind.split()[-1] for clone in result["clones"].values() for kind in clone["outcomes"]}
    result["families"] = len(named & set(FAMILIES))
    record.write_result(given, result)


if __name__ == "__main__":
    main()
