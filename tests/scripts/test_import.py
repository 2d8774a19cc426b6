"""Launch scripts as people have them, and what ``vfun import`` makes of them. The scripts are our own, of the
originals' flags and values; ``benchmarks/import_originals.py`` reads the originals'."""

import json
import os
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs import vfun_here
from vfun_cli.config.options import options
from vfun_cli.config.originals import FLAGS
from vfun_cli.config.resolve import resolve
from vfun_cli.errors import ConfigError
from vfun_cli.families import FAMILIES, find
from vfun_cli.scripts.differences import differences
from vfun_cli.scripts.shell import read
from vfun_cli.scripts.trainers import TRAINERS, WITHOUT_DEFAULT
from vfun_cli.scripts.translate import Translation, resolved, translate
from vfun_cli.scripts.write import arguments, command_line, toml

USUAL = """
  --pretrained_model_name_or_path=$MODEL_NAME --train_data_dir=$DATASET_NAME --train_data_meta=$DATASET_META_NAME
  --video_sample_size=640 --token_sample_size=640 --video_sample_stride=2 --video_sample_n_frames=81
  --train_batch_size=1 --gradient_accumulation_steps=1 --dataloader_num_workers=8 --num_train_epochs=100
  --checkpointing_steps=50 --learning_rate=2e-05 --seed=42 --output_dir="out dir" --gradient_checkpointing
  --mixed_precision="bf16" --adam_weight_decay=3e-2 --adam_epsilon=1e-10 --vae_mini_batch=1 --max_grad_norm=0.05
  --random_hw_adapt --training_with_video_token_length --enable_bucket --uniform_sampling --low_vram
"""
FULL = "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --trainable_modules ."
LORA = '--rank=64 --network_alpha=32 --target_name="q,k,v" --use_peft_lora'
HEAD = """#!/bin/bash
export MODEL_NAME="models/Some-Model"
export DATASET_NAME=datasets/ours/  # a comment
export DATASET_META_NAME="${DATASET_NAME}metadata.json"
NCCL_DEBUG=INFO

"""


def script(
    trainer: str, *more: str, launcher: str = "accelerate launch --mixed_precision=bf16", head: str = HEAD
) -> str:
    """Each option in a line of its own, from line 8 on."""
    flags = [*USUAL.split(" --")[1:], *" ".join(more).split("--")[1:]]
    lines = [f"{launcher} {trainer}", *(f"  --{flag.lstrip('-').strip()}" for flag in flags)]
    return head + " \\\n".join(line.replace("\n", " ") for line in lines) + "\n"


def imported(tmp_path: Path, text: str | bytes, **how: object) -> Translation:
    path = tmp_path / "launch.sh"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return translate(path, **how)  # type: ignore[arg-type]


CASES = {
    "wan-s2v": ("scripts/wan2.2/train_s2v.py", (FULL, '--boundary_type="full"', "--control_ref_image=random")),
    "wan-fun-control": (
        "scripts/wan2.1_fun/train_control.py",
        (FULL, "--image_sample_size=640 --train_mode=control_ref"),
    ),
    "hunyuanvideo-t2v": ("scripts/hunyuanvideo/train.py", (FULL, "--image_sample_size=640 --train_mode=normal")),
    "hunyuanvideo-i2v": ("scripts/hunyuanvideo/train.py", (FULL, "--image_sample_size=640 --train_mode=i2v")),
    "easyanimate-v5.1-control": (
        "scripts/train_control.py",
        (FULL, "--image_sample_size=1024 --loss_type=flow --train_mode=control_ref", "--config_path config/e.yaml"),
    ),
    "easyanimate-v5-control": (
        "scripts/train_control.py",
        (FULL, "--image_sample_size=1024 --loss_type=ddpm --train_mode=control"),
    ),
    "cogvideox-fun": ("scripts/cogvideox_fun/train.py", (FULL, "--image_sample_size=640 --train_mode=inpaint")),
}
LORAS = {
    "wan-s2v": ("scripts/wan2.2/train_s2v_lora.py", (LORA,)),
    "wan-fun-control": ("scripts/wan2.1_fun/train_control_lora.py", (LORA, "--image_sample_size=640")),
    "hunyuanvideo-t2v": ("scripts/hunyuanvideo/train_lora.py", (LORA, "--image_sample_size=640")),
    "hunyuanvideo-i2v": ("scripts/hunyuanvideo/train_lora.py", (LORA, "--image_sample_size=640 --train_mode=i2v")),
    "cogvideox-fun": (
        "scripts/cogvideox_fun/train_lora.py",
        ('--rank=64 --network_alpha=32 --target_name="to_q,to_k,ff.0"', "--image_sample_size=512 --train_mode=inpaint"),
    ),
}
EVERY = [("train", *case) for case in CASES.items()] + [("lora", *case) for case in LORAS.items()]
LAUNCHERS = {
    "accelerate launch --mixed_precision=bf16": "auto",
    "accelerate launch --use_fsdp --fsdp_sharding_strategy FULL_SHARD --fsdp_cpu_ram_efficient_loading False": "fsdp",
    "accelerate launch --use_deepspeed --deepspeed_config_file config/zero_stage2_config.json": "zero2",
    "accelerate launch --zero_stage 3 --use_deepspeed --deepspeed_config_file config/zero_stage3_config.json": "zero3",
    "torchrun --nproc_per_node=8 --nnodes=2 --node_rank 0 --master_addr=h --master_port 29500": "ddp",
    "deepspeed --num_gpus 4": "zero2",
    "python3 -m torch.distributed.run --nproc_per_node 2": "ddp",
    "python": "single",
}


@pytest.mark.parametrize(("command", "family", "case"), EVERY)
def test_a_script_of_each_trainer_is_told_and_taken_whole(
    command: str, family: str, case: tuple[str, tuple[str, ...]], tmp_path: Path
) -> None:
    found = imported(tmp_path, script(case[0], *case[1]))
    assert (found.command, found.family, found.refused) == (command, family, ())
    config = resolved(found).config
    assert list(map(str, config.train_data_meta)) == ["datasets/ours/metadata.json"]
    assert (config.video_sample_stride, config.output_dir) == (2, Path("out dir"))
    outcomes = {row.original.split()[0]: row.outcome for row in found.rows if row.line is not None}
    assert outcomes["--video_sample_stride"] == "kept"
    assert outcomes["NCCL_DEBUG=INFO"] == "without effect"


@pytest.mark.parametrize(
    ("launcher", "command", "family", "case"),
    [(next(iter(LAUNCHERS)), *each) for each in EVERY] + [(launcher, *EVERY[0]) for launcher in LAUNCHERS],
)
def test_the_command_and_the_file_alone_resolve_to_the_same(
    launcher: str, command: str, family: str, case: tuple[str, tuple[str, ...]], tmp_path: Path
) -> None:
    found = imported(tmp_path, script(case[0], *case[1], launcher=launcher))
    assert found.given.get("strategy", "auto") == LAUNCHERS[launcher]
    (tmp_path / "vfun.toml").write_text(toml(found))
    by_file = resolve(command, find(family), {}, environ={}, directory=tmp_path)
    assert by_file.config == resolved(found).config
    shell = subprocess.run(
        ["bash", "-c", f'vfun() {{ printf "%s\\0" "$@"; }}\n{command_line(found)}'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stdout.split("\0")[:-1] == arguments(found, {})


def test_what_a_script_leaves_out_is_what_the_original_does_then(tmp_path: Path) -> None:
    found = imported(
        tmp_path,
        "python scripts/wan2.2/train_s2v.py --pretrained_model_name_or_path=m --seed 1 --trainable_modules .\n",
    )
    config = resolved(found).config
    assert (config.train_batch_size, config.learning_rate, config.checkpointing_steps) == (16, 1e-4, 500)
    assert (config.enable_bucket, config.uniform_sampling, config.gradient_checkpointing) == (False, False, "none")
    assert (config.lr_scheduler, config.mixed_precision, str(config.output_dir)) == (
        "constant",
        "no",
        "sd-model-finetuned",
    )
    assert "--train_batch_size is left out: 16" in {row.original for row in found.rows if row.outcome == "translated"}


def test_launchers_say_machines_processes_and_devices(tmp_path: Path) -> None:
    case = CASES["wan-s2v"]
    launcher = "torchrun --nproc_per_node=8 --nnodes=2 --node_rank 1 --master_addr=h --master_port 29500"
    config = resolved(imported(tmp_path, script(case[0], *case[1], launcher=launcher))).config
    assert (config.num_processes, config.num_machines, config.machine_rank) == (16, 2, 1)
    assert (config.main_process_ip, config.main_process_port, config.strategy) == ("h", 29500, "ddp")
    devices = imported(tmp_path, script(case[0], *case[1], launcher="accelerate launch --gpu_ids 0,2"))
    assert command_line(devices).startswith("CUDA_VISIBLE_DEVICES=0,2 vfun train wan-s2v \\\n")


def test_a_deepspeed_file_that_is_there_decides(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    zero = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    (tmp_path / "config/ds.json").write_text(json.dumps(zero))
    case = CASES["wan-s2v"]
    launcher = "accelerate launch --use_deepspeed --deepspeed_config_file config/ds.json"
    assert imported(tmp_path, script(case[0], *case[1], launcher=launcher)).given["strategy"] == "zero3-offload"
    (tmp_path / "config/ds.json").write_text("{")
    with pytest.raises(ConfigError, match=r"line 7: .*ds\.json cannot be read"):
        imported(tmp_path, script(case[0], *case[1], launcher=launcher))


def test_line_ends_of_windows_and_blanks_behind_a_backslash_are_told_and_read_over(tmp_path: Path) -> None:
    plain = script(*CASES["wan-s2v"][:1], *CASES["wan-s2v"][1])
    expected = imported(tmp_path, plain)
    worse = "\ufeff" + plain.replace("\\\n  --seed", "\\ \t\n  --seed").replace("\n", "\r\n")
    found = imported(tmp_path, worse)
    assert found.given == expected.given
    whats = {remark.what: remark.line for remark in found.remarks}
    assert "lines end as on Windows" in whats
    assert plain.splitlines()[whats["blanks behind the backslash"]].strip().startswith("--seed")


def test_variables_that_the_script_does_not_say_stay_variables(tmp_path: Path) -> None:
    case = CASES["wan-s2v"]
    head = (
        'NUM=$(nvidia-smi -L | wc -l)\nif [ -n "$1" ]; then OUT=a; fi\nexport MODEL_NAME=m DATASET_META_NAME=d.json\n'
    )
    text = script(case[0], *case[1], "--checkpoints_total_limit=${LIMIT:-3}", "--resume_from_checkpoint=$OUT/x",
                  launcher="accelerate launch --num_processes $NUM", head=head)  # fmt: skip
    found = imported(tmp_path, text)
    assert set(found.variables) == {"NUM", "OUT", "DATASET_NAME"}
    assert found.given["checkpoints_total_limit"] == 3
    line = command_line(found)
    assert '--num-processes="${NUM}"' in line and '--resume-from-checkpoint="${OUT}/x"' in line
    assert "# num_processes = " in toml(found)
    assert "--num-processes=8" in arguments(found, {"NUM": "8"})
    said = vfun_here("import", tmp_path / "launch.sh", "--check")
    assert said.code == 2 and "$NUM" in said.err


def test_arrays_prefixes_pipes_and_devices_in_front(tmp_path: Path) -> None:
    text = (
        'ARGS=(--seed 7 --output_dir "a b")\nARGS+=(--video_sample_stride=3)\nMORE="--rank 8"\ncd /somewhere\n'
        'CUDA_VISIBLE_DEVICES=1 nohup accelerate launch scripts/wan2.2/train_s2v_lora.py "${ARGS[@]}" $MORE '
        "--pretrained_model_name_or_path m 2>&1 | tee log.txt &\n"
    )
    found = imported(tmp_path, text)
    assert {name: found.given[name] for name in ("seed", "output_dir", "video_sample_stride", "rank")} == {
        "seed": 7, "output_dir": Path("a b"), "video_sample_stride": 3, "rank": 8,
    }  # fmt: skip
    assert command_line(found).startswith("CUDA_VISIBLE_DEVICES=1 vfun lora wan-s2v")
    assert {"nohup", "cd /somewhere", "2>& 1", "tee log.txt"} <= {remark.what for remark in found.remarks}


def test_abbreviations_mean_what_argparse_takes_them_for(tmp_path: Path) -> None:
    case = CASES["wan-s2v"]
    found = imported(tmp_path, script(case[0], *case[1], "--max_train_st 9"))
    assert found.given["max_train_steps"] == 9
    assert any(row.outcome == "translated" and "--max-train-steps 9" in row.vfun for row in found.rows)


def test_the_differences_of_the_page_are_those_that_concern_the_script(tmp_path: Path) -> None:
    case = CASES["cogvideox-fun"]
    differs = {row.original for row in imported(tmp_path, script(case[0], *case[1])).rows if row.outcome == "differs"}
    assert any(text.startswith("--uniform_sampling pins each rank") for text in differs)
    assert "2b models fail with a shape mismatch beyond 49 frames" in differs
    assert not any("--max_grad_norm 0 " in text or "FSDP reduces" in text or "wav2vec" in text for text in differs)
    fsdp = imported(tmp_path, script(case[0], *case[1], launcher="accelerate launch --use_fsdp"))
    assert "FSDP reduces gradients in bf16" in {row.original for row in fsdp.rows}


def test_every_flag_that_the_page_makes_a_condition_exists() -> None:
    launchers = {"zero3_save_16bit_model", "deepspeed_multinode_launcherr"}
    known = {*options(), *FLAGS, *launchers, "use_fsdp", "use_deepspeed"}
    conditions = {name for row in differences() for name in (*(name for name, _ in row.typed), *row.absent)}
    assert conditions <= known, conditions - known
    assert {family for row in differences() for family in row.families} == set(FAMILIES)


def test_every_family_has_a_trainer_and_every_default_is_an_option() -> None:
    assert {family for trainer in TRAINERS for family in trainer.families} == set(FAMILIES)
    known = frozenset(WITHOUT_DEFAULT).union(*(trainer.defaults for trainer in TRAINERS))
    assert known <= set(options())


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "unclosed quote": (
        script("scripts/wan2.2/train_s2v.py", FULL).replace('"out dir"', '"out dir'),
        "line 22: .*quote",
    ),
    "no launch": ("echo hello\npip install vfun\n", "starts no training"),
    "launch in a loop": ("for i in 1 2; do\n python scripts/wan2.2/train_s2v.py --seed $i\ndone\n", "line 2: .*'for'"),
    "family not trained": (
        "accelerate launch scripts/flux/train.py --seed 1\n",
        "line 1: scripts/flux/train.py trains none",
    ),
    "binary": (b"\x7fELF\0\xff\xfe" * 99, "no text"),
    "empty": (" \n", "is empty"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
    "missing backslash": (
        "accelerate launch scripts/wan2.2/train_s2v.py \\\n  --seed 1\n  --rank 2 \\\n  --low_vram\n",
        "line 3: .*--rank",
    ),
    "comment inside": (
        "accelerate launch scripts/wan2.2/train_s2v.py \\\n  --seed 1 \\\n#  --rank 2 \\\n  --low_vram\n",
        "line 4: .*--low_vram",
    ),
    "unknown flag": (
        "python scripts/wan2.2/train_s2v.py --learning_rat 1 \\\n --lerning_rate 1\n",
        "line 2: --lerning_rate .*learning_rate",
    ),
    "value missing": (
        "python scripts/wan2.2/train_s2v.py \\\n --seed \\\n --low_vram\n",
        "line 2: --seed has no value",
    ),
    "two launches": (
        "python scripts/wan2.2/train_s2v.py\npython scripts/hunyuanvideo/train.py\n",
        "starts 2 trainings",
    ),
    "open bracket": ("A=$(ls\npython scripts/wan2.2/train_s2v.py\n", "line 1: .*bracket"),
    "family not told": ("python train.py --seed 1\n", "may be any of"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_script_is_refused_with_the_line(fault: str, tmp_path: Path) -> None:
    text, expected = BROKEN[fault]
    with pytest.raises(ConfigError, match=expected) as caught:
        imported(tmp_path, text)
    assert caught.value.hint
    said = vfun_here("import", tmp_path / "launch.sh")
    assert said.code == 2 and "fault of vfun" not in said.err and not said.out


def test_a_directory_and_a_file_that_is_not_there_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.sh"):
        assert vfun_here("import", path).code == 2


def test_one_of_several_launches_is_chosen(tmp_path: Path) -> None:
    text = "python scripts/wan2.2/train_s2v.py --seed 1\npython scripts/hunyuanvideo/train.py --seed 2\n"
    assert imported(tmp_path, text, number=2).family == "hunyuanvideo-t2v"
    with pytest.raises(ConfigError, match="no launch 3"):
        imported(tmp_path, text, number=3)


def test_what_vfun_does_not_do_is_shown_and_makes_exit_code_2(tmp_path: Path) -> None:
    case = CASES["wan-s2v"]
    text = script(case[0], *case[1], "--boundary_type=low").replace('"bf16"', "fp16").replace("--seed=42", "--seed=x")
    found = imported(tmp_path, text)
    assert {row.original.split()[0] for row in found.refused} == {"--boundary_type", "--mixed_precision", "--seed"}
    said = vfun_here("import", tmp_path / "launch.sh")
    assert said.code == 2 and "the command above goes without" in said.err and "vfun train wan-s2v" in said.out


def test_nothing_of_a_script_runs(tmp_path: Path) -> None:
    trap = f"touch {tmp_path}/ran\nA=$(touch {tmp_path}/ran)\n: > {tmp_path}/ran\n"
    found = imported(
        tmp_path, trap + script("scripts/wan2.2/train_s2v.py", FULL, f"--resume_from_checkpoint=`touch {tmp_path}/ran`")
    )
    assert found.family == "wan-s2v"
    assert not (tmp_path / "ran").exists()


def test_out_writes_the_file_and_never_over_one(tmp_path: Path) -> None:
    path = tmp_path / "launch.sh"
    path.write_text(script(CASES["wan-s2v"][0], *CASES["wan-s2v"][1]))
    said = vfun_here("import", path, "--out", tmp_path)
    assert said.code == 0 and (tmp_path / "vfun.toml").read_text() in said.out
    before = (tmp_path / "vfun.toml").read_bytes()
    again = vfun_here("import", path, "--out", tmp_path)
    assert again.code == 2 and "exists already" in again.err and (tmp_path / "vfun.toml").read_bytes() == before


def test_json_is_one_object_with_everything(tmp_path: Path) -> None:
    path = tmp_path / "launch.sh"
    path.write_text(script(CASES["wan-s2v"][0], *CASES["wan-s2v"][1]))
    told = json.loads(vfun_here("import", path, "--json").out)
    assert (told["command"], told["family"], told["variables"], told["check"]) == ("train", "wan-s2v", [], None)
    assert tomllib.loads(told["toml"])["wan-s2v"]["video_sample_stride"] == 2
    assert {row["outcome"] for row in told["rows"]} == {"kept", "translated", "without effect", "differs"}
    assert told["command_line"].startswith("vfun train wan-s2v \\\n")


@pytest.mark.slow
def test_check_ends_as_the_dry_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vfun_cli.demo import default as demo_default

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "launch.sh"
    path.write_text(script(CASES["wan-s2v"][0], *CASES["wan-s2v"][1]))
    missing = vfun_here("import", path, "--check", "--json")
    assert missing.code != 0 and json.loads(missing.out)["check"]["exit_code"] == missing.code
    demo_default.make(find("cogvideox-fun"))
    demo = tmp_path / "vfun-demo/cogvideox-fun"
    names = f"export MODEL_NAME={demo}/model DATASET_NAME={demo}/data DATASET_META_NAME={demo}/data/metadata.json\n"
    text = script(CASES["cogvideox-fun"][0], *CASES["cogvideox-fun"][1], head=names)
    path.write_text(text.replace("640", "64").replace("n_frames=81", "n_frames=9").replace("stride=2", "stride=1"))
    works = vfun_here("import", path, "--check", "--json")
    assert works.code == 0, works.err
    assert json.loads(json.loads(works.out)["check"]["output"])["config"]["video_sample_size"] == 64


ANY_TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r"), max_size=20)


@given(st.lists(ANY_TEXT, min_size=1, max_size=5))
@settings(max_examples=200)
def test_quoted_words_are_read_as_the_shell_reads_them(words: list[str]) -> None:
    found = read("run " + " ".join(map(shlex.quote, words)), "s").commands[0]
    assert [word.text for word in found.words[1:]] == words
    assert [shlex.split(word.typed) for word in found.words[1:]] == [[word] for word in words]


PIECES = st.sampled_from(
    [
        "a",
        " ",
        "'b c'",
        '"d $A e"',
        "${A}",
        "${B}",
        "${C:-x y}",
        '"${C:-z}"',
        "\\ ",
        "\\\n",
        "#f",
        "'$A'",
        '\\"',
        "=",
        "--g",
        '""',
        "\t",
    ]
)


@given(st.lists(PIECES, max_size=12))
@settings(max_examples=60)
def test_expansions_are_those_of_bash(pieces: list[str]) -> None:
    start = "A='1 2'\nB=3\n"
    line = "run x" + "".join(pieces)
    shell = subprocess.run(
        ["bash", "-c", f'{start}run() {{ printf "%s\\0" "$@"; }}\n{line}'],
        capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    found = read(start + line, "s").commands[0]
    assert [word.text for word in found.words[1:]] == shell.stdout.split("\0")[:-1]


@given(ANY_TEXT)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read(text, "s")
    except ConfigError:
        pass
