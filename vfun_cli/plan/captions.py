"""How much of the captions a family's text encoders never see, by the tokenizers of the model directory."""

from collections.abc import Mapping
from pathlib import Path

from vfun_cli import console
from vfun_cli.errors import VfunError
from vfun_cli.families.detect import read_dims
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.codes import Problem
from vfun_cli.modeling.encoders.captions import cut_tokens


def long_captions(spec: FamilySpec, model_dir: Path | None, captions: Mapping[int, str]) -> list[Problem]:
    """One warning for each text encoder that does not read all captions to their end.

    None where the model is not on this machine. A model that cannot be read is told, and judged by who loads it: the
    data must not seem bad because the model directory is.

    Args:
        captions: by row.
    """
    if model_dir is None or not model_dir.is_dir():
        return []
    try:
        readers = spec.model.captions(read_dims(spec, model_dir))
        cut = [(reader, cut_tokens(reader, model_dir, captions.values())) for reader in readers]
    except VfunError as error:
        console.warn(f"the length of the captions is not checked: {error.message}")
        return []
    problems = []
    for reader, lost in cut:
        rows = [row for row, caption in captions.items() if caption in lost]
        if rows:
            tokens, unseen = (sum(each) for each in zip(*(lost[captions[row]] for row in rows), strict=True))
            which = f" of {reader.folder}" if len(readers) > 1 else ""
            message = (
                f"{len(rows)} of {len(captions)} captions (first row {rows[0]}) are longer than the {reader.limit} "
                f"tokens{which}: {100 * unseen / tokens:.0f} % of their text is not seen"
            )
            problems.append(Problem(row=None, code="long-caption", message=message, field="text"))
    return problems
