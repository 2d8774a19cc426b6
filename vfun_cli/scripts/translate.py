"""From a launch script to vfun's options, and what becomes of everything that it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vfun_cli.config.optimizers import OPTIMIZER_FLAGS
from vfun_cli.config.options import options, parse, plain_kind
from vfun_cli.config.originals import FLAGS, meaning
from vfun_cli.config.resolve import Resolved, family_defaults, resolve
from vfun_cli.config.strategies import STRATEGIES, STRATEGY_FLAGS
from vfun_cli.errors import ConfigError, as_flag
from vfun_cli.families import find
from vfun_cli.families.spec import FamilySpec
from vfun_cli.files import open_bounded
from vfun_cli.lfs import START, WHAT
from vfun_cli.scripts.differences import differences
from vfun_cli.scripts.flags import Arity, Typed, read_flags
from vfun_cli.scripts.launcher import Launch, Placement, hidden_launches, launches, placement
from vfun_cli.scripts.rows import OUTCOMES, Outcome, Row, Setting
from vfun_cli.scripts.shell import Command, Remark, Script, Word, read
from vfun_cli.scripts.trainers import WITH_VALIDATION, Trainer, family_of, trainer_of
from vfun_cli.scripts.write import as_typed

LARGEST_SCRIPT = 1 << 20
"""Bytes: the originals' have a hundredth of it."""

PASSED_ON = (
    "CUDA_*", "NCCL_*", "GLOO_*", "TORCH_*", "PYTORCH_*", "OMP_*", "GOMP_*", "WANDB_*", "TMPDIR", "LD_LIBRARY_PATH",
    "PATH",
)  # fmt: skip
"""Variables that tune a machine and not a run: vfun's processes inherit them."""

SILENT = ("set", "echo", "printf", "true", ":", "shopt", "ulimit", "exit", "wait", "trap", "unset", "mkdir", "date")
"""Commands that say nothing about a run."""


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A launch as vfun has it."""

    script: Path
    launch: Launch
    command: str
    family: str
    settings: tuple[Setting, ...]
    """In the order of the options' declarations."""
    environment: Mapping[str, Word]
    """In front of the command."""
    rows: tuple[Row, ...]
    remarks: tuple[Remark, ...]

    @property
    def given(self) -> dict[str, Any]:
        """The options whose values are known."""
        return {setting.name: setting.value for setting in self.settings if setting.word is None}

    @property
    def variables(self) -> tuple[str, ...]:
        """Those that the script uses and does not set."""
        words = [*(setting.word for setting in self.settings if setting.word), *self.environment.values()]
        return tuple(dict.fromkeys(name for word in words for name in word.variables))

    @property
    def refused(self) -> tuple[Row, ...]:
        """What vfun does not do and the script asks for."""
        return tuple(row for row in self.rows if row.outcome == "refused")


def read_script(path: Path) -> Script:
    """The commands of a script in a file.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    another = "Name the script that starts the training."
    try:
        with open_bounded(path, LARGEST_SCRIPT) as file:
            content = file.read()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.", hint=another) from None
    if content.startswith(START):
        raise ConfigError(f"{path} is {WHAT}.", hint=f"Run git lfs pull in {path.parent}.")
    if not content.strip():
        raise ConfigError(f"{path} is empty.", hint=another)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} is no text: line {line} is not UTF-8.", hint=another) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{path} is no text: line {line} holds a zero byte.", hint=another)
    return read(text, str(path))


def choose_launch(path: Path, script: Script, number: int | None) -> Launch:
    """The command that trains, or the one of that number, counted from 1.

    Raises:
        ConfigError: there is none, or there are several and none was chosen.
    """
    found = launches(script)
    if not found:
        hidden = "".join(
            f" {launch} is inside of {inside!r}, which is not read." for launch, inside in hidden_launches(script)
        )
        raise ConfigError(
            f"{path} starts no training: no accelerate launch, torchrun, deepspeed or python with a train*.py.{hidden}",
            hint="Name the script that starts it, with the command outside of conditions, loops and functions.",
        )
    listed = "; ".join(f"{place}: {launch}" for place, launch in enumerate(found, start=1))
    if number is not None and number > len(found):
        raise ConfigError(f"{path} has no launch {number}. Its launches are {listed}.", option="--launch")
    if number is None and len(found) > 1:
        raise ConfigError(
            f"{path} starts {len(found)} trainings: {listed}.",
            hint="Choose one with --launch N.",
            option="--launch",
        )
    return found[(number or 1) - 1]


def translate(path: Path, *, family: str | None = None, number: int | None = None) -> Translation:
    """A script as vfun has it.

    Args:
        family: of the model, if the script does not tell.
        number: which of its launches, counted from 1.

    Raises:
        ConfigError: it is no script, starts no training or several, trains what vfun does not, or is faulty.
    """
    script = read_script(path)
    launch = choose_launch(path, script, number)
    trainer = trainer_of(launch.script.text, f"{path}, line {launch.script.line}", family)
    typed = list(read_flags(launch.arguments, _known(), _arity, str(path), "the original scripts"))
    values = {flag.name: flag.text for flag in typed}
    spec = find(family_of(trainer, values, f"{path}, line {launch.script.line}", family))
    place = placement(launch, [Path(), *path.absolute().parents][:5])
    work = _Work(command=trainer.command, spec=spec)
    work.rows += place.rows
    _take_strategy(work, place, values)
    for position, flag in enumerate(typed):
        later = next((other for other in typed[position + 1 :] if other.name == flag.name), None)
        if later is not None:
            work.tell("without effect", flag, f"typed again in line {later.line}, which holds")
        else:
            _take_flag(work, flag, place)
    _take_launcher(work, place, values)
    _add_defaults(work, trainer, place)
    environment = _take_environment(work, launch.command, place)
    _resolve(work)
    mentioned = {**place.mentioned, **values}
    strategy = str(work.settings["strategy"].value) if "strategy" in work.settings else "auto"
    work.rows += [
        Row(outcome="differs", original=one.original, vfun=one.vfun)
        for one in differences()
        if one.holds(work.command, spec.name, strategy, mentioned)
    ]
    order = list(options())
    return Translation(
        script=path,
        launch=launch,
        command=work.command,
        family=spec.name,
        settings=tuple(sorted(work.settings.values(), key=lambda setting: order.index(setting.name))),
        environment=environment,
        rows=tuple(sorted(work.rows, key=lambda row: (OUTCOMES.index(row.outcome), row.line or 0))),
        remarks=(*script.remarks, *_others(script, launch)),
    )


def resolved(translation: Translation) -> Resolved:
    """The options of the run as the command alone settles them: no environment, no vfun.toml.

    Raises:
        ConfigError: they cannot work together.
    """
    return _resolved(translation.command, find(translation.family), translation.given)


def _resolved(command: str, spec: FamilySpec, given: Mapping[str, Any]) -> Resolved:
    with TemporaryDirectory(prefix="vfun-import-") as empty:
        return resolve(command, spec, given, environ={}, directory=Path(empty))


@dataclass(kw_only=True)
class _Work:
    """What is found so far."""

    command: str
    spec: FamilySpec

    def __post_init__(self) -> None:
        self.settings: dict[str, Setting] = {}
        self.rows: list[Row] = []

    def tell(self, outcome: Outcome, flag: Typed, words: str) -> None:
        self.rows.append(Row(outcome=outcome, line=flag.line, original=flag.shown, vfun=words))

    def set(self, name: str, flag: Typed, *, where: str | None = None) -> None:
        """Take the value of a flag for an option; a value that vfun refuses is a row."""
        if not flag.settled:
            names = ", ".join(f"${name}" for word in flag.values for name in word.variables) or "a command"
            self.settings[name] = Setting(name=name, value=None, word=flag.values[0])
            self.tell("kept", flag, f"{as_flag(name)}; the script does not say what {names} is")
            return
        kind = plain_kind(options()[name][1])
        said: Any = [word.text for word in flag.values] if kind is tuple else flag.text
        if not flag.values:
            switch = options()[name][2].switch
            said = switch[1] if switch else True
        try:
            value = parse(name, said, where or flag.spelled)
        except ConfigError as error:
            hint = f" {error.hint}" if error.hint and error.hint != ConfigError.usual_hint else ""
            self.tell("refused", flag, f"{error.message}{hint}")
            return
        raw = flag.text if kind is Path else None
        self.settings[name] = Setting(name=name, value=value, raw=raw)
        same = flag.spelled.lstrip("-").replace("-", "_") == name
        self.tell("kept" if same else "translated", flag, self.typed(name))

    def add(self, name: str, value: Any) -> None:
        """An option that the script does not name."""
        self.settings[name] = Setting(name=name, value=parse(name, value, name))

    def typed(self, name: str) -> str:
        """The option as it is typed."""
        return " ".join(as_typed(self.settings[name]))


def _known() -> frozenset[str]:
    """Every flag that may stand behind a training script: the originals', and vfun's own."""
    return frozenset((*options(), *FLAGS, *STRATEGY_FLAGS, *OPTIMIZER_FLAGS))


def _arity(name: str) -> Arity:
    if name in FLAGS:
        return "none" if FLAGS[name].switch else "one"
    if name in STRATEGY_FLAGS or name in OPTIMIZER_FLAGS:
        return "none"
    _, kind, opt = options()[name]
    if plain_kind(kind) is bool or opt.switch is not None:
        return "none"
    return "more" if plain_kind(kind) is tuple else "one"


def _take_strategy(work: _Work, place: Placement, values: Mapping[str, str]) -> None:
    asked = [STRATEGY_FLAGS[name] for name in values if name in STRATEGY_FLAGS]
    strategy = place.strategy
    if strategy is None and asked and "config_file" in place.mentioned:
        strategy = asked[-1]
    if strategy is not None:
        work.add("strategy", strategy)


def _take_flag(work: _Work, flag: Typed, place: Placement) -> None:
    """One flag of the training script."""
    if flag.name in STRATEGY_FLAGS:
        if "strategy" in work.settings:
            work.tell("kept", flag, f"in {work.typed('strategy')}")
        else:
            work.tell("without effect", flag, "the launcher decides, and nothing told it so")
    elif flag.name in OPTIMIZER_FLAGS:
        work.add("optimizer", OPTIMIZER_FLAGS[flag.name])
        work.tell("translated", flag, work.typed("optimizer"))
    elif flag.name in FLAGS:
        value = True if FLAGS[flag.name].switch else flag.text
        found = meaning(flag.name, value, work.spec)
        if found.kind == "refused":
            work.tell("refused", flag, f"{found.words} {found.hint or ''}".strip())
        else:
            work.tell("without effect", flag, found.words)
    elif flag.name not in options(work.command):
        work.tell("refused", flag, f"vfun {work.command} has no such option.")
    else:
        work.set(flag.name, flag)


def _take_launcher(work: _Work, place: Placement, values: Mapping[str, str]) -> None:
    """Options of the launcher that are options of a run."""
    for name, flag in place.options.items():
        if name in values:
            work.tell("without effect", flag, f"the script's own --{name} says it")
        elif name == "device":
            work.add("device", "cpu")
            work.tell("translated", flag, work.typed("device"))
        else:
            work.set(name, flag)
    if (each := place.per_machine) is not None:
        machines = work.settings.get("num_machines")
        if not each.text.isdecimal():
            work.tell("without effect", each, "every device of the machine has a process anyway")
        elif machines is not None and machines.word is not None:
            work.tell("differs", each, "times the machines, whose number the script does not say: add --num-processes")
        else:
            work.add("num_processes", int(each.text) * (machines.value if machines else 1))
            work.tell("translated", each, f"{work.typed('num_processes')}, those of all machines")


def _add_defaults(work: _Work, trainer: Trainer, place: Placement) -> None:
    """What the script leaves to the original's defaults, where they are not the family's."""
    strategy = str(work.settings["strategy"].value) if "strategy" in work.settings else "auto"
    ours = family_defaults(work.command, work.spec, strategy)
    theirs = dict(trainer.defaults)
    if any(name.startswith("validation_") for name in work.settings):
        theirs |= WITH_VALIDATION
    if strategy not in _DEEPSPEED and "config_file" not in place.mentioned:
        theirs["mixed_precision"] = "no"
    scheduler = work.settings.get("lr_scheduler")
    if (scheduler.value if scheduler else theirs["lr_scheduler"]) == "constant":
        theirs.pop("lr_warmup_steps")  # it knows none
    refused = {row.original.split()[0].lstrip("-") for row in work.rows if row.outcome == "refused"}
    for name in options(work.command):
        if name not in theirs or name in work.settings or name in refused:
            continue
        value = parse(name, theirs[name], name)
        if value != getattr(ours, name):
            work.add(name, value)
            original = f"--{name} is left out: {_word(theirs[name])}"
            work.rows.append(Row(outcome="translated", original=original, vfun=work.typed(name)))


_DEEPSPEED = tuple(name for name, strategy in STRATEGIES.items() if strategy.wrapper == "deepspeed")


def _word(value: Any) -> str:
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else str(value)


def _take_environment(work: _Work, command: Command, place: Placement) -> dict[str, Word]:
    """Variables that stay in front of the command."""
    kept: dict[str, Word] = {}
    for name, word in command.exported.items():
        shown = f"{name}={word.text}"
        if any(fnmatchcase(name, pattern) for pattern in PASSED_ON):
            kept[name] = word
            row = Row(
                outcome="kept", line=word.line, original=shown, vfun="in front of the command; the file has no place"
            )
        elif name in command.expanded:
            row = Row(outcome="translated", line=word.line, original=shown, vfun="its value, where it is used")
        else:
            row = Row(outcome="without effect", line=word.line, original=shown, vfun="vfun does not read it")
        work.rows.append(row)
    for name, word in command.assigned.items():
        if name not in command.expanded and any(fnmatchcase(name, pattern) for pattern in PASSED_ON):
            words = "not exported: no program sees it, the original's neither"
            work.rows.append(Row(outcome="without effect", line=word.line, original=f"{name}={word.text}", vfun=words))
    if place.visible is not None:
        kept["CUDA_VISIBLE_DEVICES"] = place.visible
    return kept


def _resolve(work: _Work) -> None:
    """What cannot work together is a row."""
    given = {name: setting.value for name, setting in work.settings.items() if setting.word is None}
    try:
        _resolved(work.command, work.spec, given)
    except ConfigError as error:
        line = None
        hint = f" {error.hint}" if error.hint else ""
        work.rows.append(
            Row(outcome="refused", line=line, original="these options together", vfun=f"{error.message}{hint}")
        )


def _others(script: Script, launch: Launch) -> Sequence[Remark]:
    """What else stands in the script."""
    found = [Remark(line=word.line, what=word.text, why="not kept: put it in front of vfun") for word in launch.before]
    trains = [one.command for one in launches(script)]
    for command in script.commands:
        name = command.words[0].text
        if command in trains or command.inside is not None or name in SILENT:
            continue
        shown = " ".join(word.text for word in command.words[:2])
        why = _MEANS.get(name, "not run")
        found.append(Remark(line=command.line, what=shown, why=why))
    return found


_MEANS = {
    "cd": "not followed: run the command in that folder, where its paths start",
    "source": "not read: variables that it sets are not known",
    ".": "not read: variables that it sets are not known",
}
