"""What the captions of a run are made of, and how much of them a family's text encoders never see."""

from collections.abc import Sequence
from pathlib import Path

from vfun_cli import console
from vfun_cli.config.datasets import DataSet
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import VfunError
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.codes import Problem
from vfun_cli.modeling.captions import CaptionOptions
from vfun_cli.modeling.encoders.captions import cut_tokens


def caption_options(config: RunConfig, data: DataSet) -> CaptionOptions:
    """What a run makes of the texts of a data set's rows."""
    return CaptionOptions(
        prefix=config.caption_prefix if data.caption_prefix is None else data.caption_prefix,
        suffix=config.caption_suffix if data.caption_suffix is None else data.caption_suffix,
        shuffle_tags=config.shuffle_tags,
    )


def long_captions(spec: FamilySpec, model_dir: Path | None, captions: Sequence[tuple[int, str]]) -> list[Problem]:
    """One warning for each text encoder that does not read all captions to their end.

    By the tokenizers of the model directory; none where the model is not on this machine. A model that cannot be read
    is told, and judged by who loads it: the data must not seem bad because the model directory is.

    Args:
        captions: each with its row.
    """
    if model_dir is None or not model_dir.is_dir():
        return []
    try:
        readers = spec.model.captions(read_dims(spec, model_dir))
        cut = [(reader, cut_tokens(reader, model_dir, (caption for _, caption in captions))) for reader in readers]
    except VfunError as error:
        console.warn(f"the length of the captions is not checked: {error.message}")
        return []
    problems = []
    for reader, lost in cut:
        long = [(row, *lost[caption]) for row, caption in captions if caption in lost]
        if long:
            rows, tokens, unseen = zip(*long, strict=True)
            which = f" of {reader.folder}" if len(readers) > 1 else ""
            message = (
                f"{len(rows)} of {len(captions)} captions (first row {rows[0]}) are longer than the {reader.limit} "
                f"tokens{which}: {100 * sum(unseen) / sum(tokens):.0f} % of their text is not seen"
            )
            problems.append(Problem(row=None, code="long-caption", message=message, field="text"))
    return problems
