"""``vfun generate``: videos from a model, a checkpoint, an export or a LoRA."""

from pathlib import Path
from typing import Annotated

import typer

from vfun_cli import console
from vfun_cli.checkpoints.given import Given
from vfun_cli.commands.flags import Debug, Demo, Json, typed_name, typed_path


def _many(name: str, text: str, letter: str | None = None) -> typer.models.OptionInfo:
    """An option that may be given once for all videos, or once for each."""
    names = (name,) if letter is None else (name, letter)
    return typer.Option(*names, parser=typed_path, metavar="PATH", help=text, show_default=False)


def generate(
    source: Annotated[
        str | None,
        typer.Argument(
            parser=typed_name,
            metavar="[RUN | CHECKPOINT | EXPORT | MODEL_DIR]",
            help="Whose weights make the videos; with --demo also a family, for its untrained tiny model. "
            "[default: the newest checkpoint of the output directory]",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to show; may be repeated.")
    ] = None,
    image: Annotated[list[Path] | None, _many("--image", "The first frame, or whom the video shows.")] = None,
    end_image: Annotated[list[Path] | None, _many("--end-image", "The last frame (CogVideoX-Fun InP).")] = None,
    reference: Annotated[list[Path] | None, _many("--reference", "Whom it shows (Wan2.1-Fun V1.1).")] = None,
    control: Annotated[list[Path] | None, _many("--control", "The clip whose movement it follows.")] = None,
    edit: Annotated[list[Path] | None, _many("--edit", "The clip that is changed (CogVideoX-Fun).")] = None,
    edit_mask: Annotated[
        list[Path] | None, _many("--edit-mask", "A picture, white where --edit changes (CogVideoX-Fun InP).")
    ] = None,
    audio: Annotated[list[Path] | None, _many("--audio", "What is said in it (Wan2.2-S2V).")] = None,
    meta: Annotated[
        Path | None,
        typer.Option(
            "--meta",
            parser=typed_path,
            metavar="FILE",
            help="Rows to make videos of: metadata or a folder as for training, or the .json beside a video.",
            show_default=False,
        ),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            "--data-root", parser=typed_path, metavar="PATH", help="Where paths in --meta start.", show_default=False
        ),
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option(
            "--lora",
            parser=typed_path,
            metavar="FILE",
            help="A LoRA over the weights: of peft, diffusers, ComfyUI, kohya or the original scripts.",
            show_default=False,
        ),
    ] = None,
    lora_strength: Annotated[
        float | None,
        typer.Option("--lora-strength", metavar="NUMBER", help="Multiplies its own strength.", show_default=False),
    ] = None,
    frames: Annotated[int | None, typer.Option("--frames", min=1, help="Length; of Wan2.2-S2V, of a segment.")] = None,
    height: Annotated[int | None, typer.Option("--height", min=1, help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="In pixels.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", metavar="NUMBER", help="Scale of classifier-free guidance; 1: none.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", metavar="NUMBER", help="How much of --edit is replaced, 0 to 1.", show_default=False
        ),
    ] = None,
    start_from_ref: Annotated[
        bool,
        typer.Option("--start-from-ref", help="The video continues --image, not only shows who is in it (Wan2.2-S2V)."),
    ] = False,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", metavar="TEXT", help="What guidance leads away from.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Decides the noise, with the video's row.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            parser=typed_path,
            metavar="PATH",
            help="A folder or, for one video, a file. [default: CHECKPOINT-videos beside a checkpoint, else videos]",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            parser=typed_name,
            metavar="BASE",
            help="Show the videos of these weights beside, from the same noise: what training has changed.",
            show_default=False,
        ),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The moving average of the weights (--use-ema).")] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            "--pretrained-model-name-or-path",
            parser=typed_path,
            metavar="PATH",
            help="Model directory, if it has moved, or of weights that do not say theirs.",
            show_default=False,
        ),
    ] = None,
    transformer: Annotated[
        Path | None,
        typer.Option(
            "--transformer-path",
            parser=typed_path,
            metavar="PATH",
            help="Weights instead of the model directory's transformer, by default those that the run started from.",
            show_default=False,
        ),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            "--vae-path",
            parser=typed_path,
            metavar="PATH",
            help="The same instead of its VAE.",
            show_default=False,
        ),
    ] = None,
    num_processes: Annotated[
        int, typer.Option("--num-processes", min=1, metavar="N", help="Processes that share the videos, a GPU each.")
    ] = 1,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="WORD", help="cuda or cpu. [default: cuda where there is one]"),
    ] = None,
    low_vram: Annotated[
        bool, typer.Option("--low-vram", help="Encoders and the VAE are on the GPU only while they work.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make again what is there, in its place.", show_default=False)
    ] = False,
    demo: Demo = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make videos in bf16 from trained weights, without exporting them first, or from a model as it was released.

    Each video is an mp4 (a png of one frame) with its sound, and a .json beside it, which as --meta makes it again.
    What is there is not made twice, so a command that was stopped goes on where it was; a video of the same name is
    kept, and the new one numbered.

    Examples: [bold]vfun generate checkpoint-500 --prompt "a red kite"[/bold] ·
    [bold]vfun generate output_dir --meta rows.json --compare models/Wan2.2-S2V-14B[/bold] ·
    [bold]vfun generate models/HunyuanVideo --lora style.safetensors --prompt "a red kite"[/bold]
    """
    from vfun_cli.commands import generating

    media = {
        "image": image, "end_image": end_image, "reference": reference, "control": control, "edit": edit,
        "edit_mask": edit_mask, "audio": audio,
    }  # fmt: skip
    settings = {
        "frames": frames, "height": height, "width": width, "steps": steps, "guidance": guidance,
        "strength": strength, "start_from_ref": start_from_ref or None, "negative_prompt": negative_prompt,
        "seed": seed,
    }  # fmt: skip
    job = generating.decide(
        generating.Named(
            name=source,
            lora=lora,
            strength=lora_strength,
            model=model,
            given=Given(transformer=transformer, vae=vae),
            ema=ema,
            base=compare,
            demo=demo,
        ),
        generating.Wishes(
            prompts=prompt or [],
            media={name: paths for name, paths in media.items() if paths},
            meta=meta,
            root=data_root,
            settings=settings,
            output=output,
            overwrite=overwrite,
        ),
    )
    beside_a_bar = console.err.is_terminal and console.out.is_terminal  # it lets only stderr print above it
    say = console.err if json or beside_a_bar else console.out

    def tell(path: Path) -> None:
        say.print(str(path), soft_wrap=True)

    failed = generating.make(job, device=device, num_processes=num_processes, low_vram=low_vram, tell=tell)
    if failed is None:
        return
    if json:
        missing = {event.video for event in failed}
        console.print_json(
            {
                "videos": [str(order.path) for order in job.orders if order.name not in missing],
                "failed": [{"video": event.video, "message": event.message} for event in failed],
            }
        )
    generating.require_all(job, failed)
