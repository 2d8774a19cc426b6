"""Mutated files of runs, checkpoints and models: every command ends with its result or with an error that is its own.

    python benchmarks/fuzz_files.py [--mutations 1000] [--seed 0]

Writes benchmarks/results/fuzz_files.json. The JSON of a run, of its checkpoints, of LoRAs and of models, and the
headers of their safetensors, are changed by values (fields of other types and sizes, missing, twice, nested thousands
deep), by bytes and by length. Most of the checkpoints get a manifest anew, so that what reads them cannot stop at a
hash. The commands that read a file are then called in this process: none may be at fault itself, exit otherwise than
the file deserves, or take longer than a moment.
"""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import record
from safetensors.numpy import load_file, save_file

from tests.written_runs import FAMILY, write_run
from vfun_cli import families
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.lora_files import ADAPTER_FILE
from vfun_cli.demo import default as demo_default
from vfun_cli.families.spec import FamilySpec
from vfun_cli.main import main as vfun
from vfun_cli.run.rundir import RunDir

LIMIT = 20
"""Seconds that a command may take."""
NESTED = 100_000
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 7, 10**9, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "x" * 5000, "x" * 300, "\0", "\ud800", "\udc80", "../x", "/", "~", ".", "[/red]", "\x1b[2J", "a\nb",
    "train", "zero3", "(a+)+$", "(.*a){20}", [], {}, [[]], ["a"], [1, 2], [-1, 2], [0.5, 1.5], [2**40, 2**40], {"a": 1},
    {"bytes": 0},
]  # fmt: skip
"""What a field becomes."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file, and the commands that read it."""

    file: Path
    commands: Sequence[tuple[str, ...]]
    codes: frozenset[int]
    """Exit codes that a damaged file of this kind may lead to, beside 0."""
    checkpoint: Path | None = None
    """What the file is a part of, if it has a manifest."""


# Files ------------------------------------------------------------------------------------------------------------


def targets(smoke: bool) -> list[Target]:
    """Every kind of file, with real contents, under the working directory."""
    full, lora = write_run("train", Path("full")), write_run("lora", Path("lora"))
    found = [target for run in (full, lora) for target in of_run(run, merged=run is lora)]
    kohya = Path("kohya.safetensors")
    shutil.copy2(lora.checkpoint(4) / "model" / ADAPTER_FILE, kohya)
    save_file(with_alphas(load_file(kohya)), "alphas.safetensors")
    for file in (kohya, Path("alphas.safetensors")):
        start = (
            "lora",
            FAMILY,
            "--demo",
            "--rank",
            "2",
            "--network-path",
            str(file),
            "--dry-run",
            "--output-dir",
            "new",
        )
        found.append(Target(file=file, commands=[start], codes=frozenset({2, 5})))
    for name in (FAMILY,) if smoke else families.FAMILIES:
        found += of_model(families.find(name))
    return found


def with_alphas(adapter: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """A LoRA of peft's names in kohya's: ``lora_unet__a_b.lora_down.weight``, and an alpha for each layer."""
    parts = {"lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = dict[str, np.ndarray[Any, Any]]()
    for name, values in adapter.items():
        layer, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        start = f"lora_unet__{layer.replace('.', '_')}"
        renamed |= {f"{start}.{parts[part]}.weight": values, f"{start}.alpha": np.ones((), np.float32)}
    return renamed


def of_run(run: RunDir, *, merged: bool) -> list[Target]:
    """The files of a run and of its checkpoint."""
    checkpoint = run.checkpoint(4)
    resume = ("resume", str(checkpoint), "--dry-run", "--json")
    read = [
        ("checkpoints", "ls", str(run.root)),
        ("checkpoints", "verify", str(checkpoint), "--json"),
        ("checkpoints", "diff", str(checkpoint), str(checkpoint)),
        ("export-bf16", str(checkpoint), "--output", "out", "--overwrite", *(("--merge",) if merged else ())),
        *((("export-bf16", str(checkpoint), "--output", "out-lora", "--overwrite"),) if merged else ()),
        resume,
    ]
    inside = ["state.json", "manifest.json", "config/config.json"]
    inside += [str(path.relative_to(checkpoint)) for path in sorted((checkpoint / "model").iterdir())]
    # A run.json names the metadata, the device and all else that commands look at; it may deserve any error.
    described = Target(file=run.run_json, commands=[resume], codes=frozenset({2, 3, 4, 5, 6}))
    return [described] + [
        Target(file=checkpoint / name, commands=read, codes=frozenset({5}), checkpoint=checkpoint) for name in inside
    ]


def of_model(spec: FamilySpec) -> list[Target]:
    """The files of a released directory that are read before a launch."""
    demo = demo_default.make(spec)
    model = demo["pretrained_model_name_or_path"]
    commands = [("plan-buckets", spec.name, "--demo"), ("train", spec.name, "--demo", "--dry-run", "--json")]
    files = [model / spec.model.config_file, *(model / file for file, _ in spec.model.other_settings.values())]
    files += sorted(model.rglob("*.safetensors.index.json"))[:1] + sorted(model.rglob("*.safetensors"))[:1]
    # 2: another family's configuration
    return [Target(file=file, commands=commands, codes=frozenset({2, 5})) for file in files]


# Mutations --------------------------------------------------------------------------------------------------------


def places(content: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        found.append((content, key))
        places(content[key], found)
    return found


def mutate_values(text: bytes, rng: random.Random) -> bytes:
    """JSON of which one to three values are changed, removed, renamed or buried."""
    content = json.loads(text)
    if rng.random() < 0.03:
        return json.dumps(rng.choice(VALUES)).encode()
    buried = None
    for _ in range(rng.randrange(1, 4)):
        container, key = rng.choice(places(content, []) or [(content, "a")])
        how = rng.random()
        if how < 0.15 and isinstance(container, dict):
            container.pop(key)
        elif how < 0.25 and isinstance(container, dict):
            container[rng.choice(["", "\0", "\ud800", "x" * 5000, "../x", "\x1b[2J"])] = container.pop(key)
        elif how < 0.3:
            container[key], buried = (
                "BURIED",
                rng.choice(["[" * NESTED + "]" * NESTED, '{"a":' * 200 + "1" + "}" * 200]),
            )
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))  # of its own: the next change may go into it
    written = json.dumps(content)
    if buried:
        written = written.replace('"BURIED"', buried)
    if rng.random() < 0.05:
        written = written.replace("{", '{"step": 1, ', 1) if rng.random() < 0.5 else written.replace(",", ",,", 1)
    return written.encode()


def mutate_bytes(text: bytes, rng: random.Random) -> bytes:
    """A few bytes overwritten, cut or repeated."""
    data = bytearray(text)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randrange(4)] = rng.choice(
            [bytes([rng.randrange(256)]), b'"', b"{", b"]", b"\xff", b"9" * 9]
        )
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.15 else data)


def mutate(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """A whole file with a mutated part: all of a JSON, the header of safetensors."""
    change: Callable[[bytes, random.Random], bytes] = rng.choice([mutate_values, mutate_values, mutate_bytes])
    if suffix != ".safetensors":
        return change(content, rng)
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length], rng)
    stated = rng.choice([0, 2**63, length, len(content)]) if rng.random() < 0.1 else len(header)
    return stated.to_bytes(8, "little") + header + content[8 + length :]


# Commands ---------------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """A command did not end."""


def give_up(number: int, frame: Any) -> None:
    raise TooLong


def call(arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code of a command in this process, and what it said."""
    said = io.StringIO()
    code = 0
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            vfun(list(arguments))
    except SystemExit as ended:
        code = int(ended.code or 0)
    except TooLong:
        return -1, "it did not end"
    except BaseException:
        return -2, traceback.format_exc()[-2000:]
    finally:
        signal.alarm(0)
    return code, said.getvalue()


def fault(target: Target, code: int, said: str) -> str | None:
    """What is wrong with the way in which a command ended."""
    if "fault of vfun" in said or "Traceback" in said or code < 0:
        return "an internal error" if code != -1 else "a hang"
    if code and code not in target.codes:
        return f"exit code {code}"
    names = {target.file.name, (target.checkpoint or target.file).name}
    if code and target.codes == {5} and not any(name in said.replace("\n", "") for name in names):
        return "an error without the file's name"
    return None


def fuzz(found: list[Target], count: int, seed: int) -> dict[str, Any]:
    """How the commands ended, and every way that is wrong."""
    rng, codes, kinds, failures, slowest = random.Random(seed), Counter[str](), Counter[str](), [], 0.0
    for number in range(count):
        target = found[number % len(found)]
        whole = target.file.read_bytes()
        with_manifest = target.checkpoint and target.file.name != manifest.MANIFEST and rng.random() < 0.7
        kept = (target.checkpoint / manifest.MANIFEST).read_bytes() if target.checkpoint else b""
        target.file.write_bytes(mutate(whole, target.file.suffix, rng))
        if with_manifest:
            assert target.checkpoint is not None
            manifest.write_manifest(target.checkpoint)
        kinds[target.file.name] += 1
        for command in target.commands:
            started = time.perf_counter()
            code, said = call(command)
            slowest = max(slowest, time.perf_counter() - started)
            codes[f"{command[0]}: {code}"] += 1
            wrong = fault(target, code, said)
            if wrong:
                content = target.file.read_bytes()[:2000].decode("utf-8", "replace")
                failures.append(
                    {"number": number, "file": str(target.file), "command": " ".join(command), "wrong": wrong,
                     "said": said[-1500:], "content": content}
                )  # fmt: skip
        target.file.write_bytes(whole)
        if target.checkpoint:
            (target.checkpoint / manifest.MANIFEST).write_bytes(kept)
    return {
        "mutations": count,
        "failures": failures,
        "slowest_s": round(slowest, 2),
        "files": dict(kinds.most_common()),
        "ends": dict(sorted(codes.items())),
    }


def main() -> int:
    parser = record.parser("fuzz_files", __doc__)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.mutations = 16
    signal.signal(signal.SIGALRM, give_up)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        started = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            found = targets(arguments.smoke)
        commands = dict.fromkeys(command for target in found for command in target.commands)
        healthy = [(command, *call(command)) for command in commands]
        broken = [ended for ended in healthy if ended[1]]
        assert not broken, broken
        result = {"seed": arguments.seed, **fuzz(found, arguments.mutations, arguments.seed)}
        result["seconds"] = round(time.perf_counter() - started, 1)
        os.chdir("/")
    record.write_result(arguments, result)
    print(json.dumps(result, indent=1))
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
