"""How many shapes a plan can have, before any clip is drawn."""

from vfun_cli.families.spec import ClipShape, FamilySpec, ModelDims
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.sizes import round_frames, size_set


def most_shapes(spec: FamilySpec, dims: ModelDims, options: PlanOptions) -> int:
    """At most this many different (frames, height, width, clips) micro-batches can come up in any epoch.

    A clip is at most as long as its size allows, and shorter where its file is.
    """
    shapes = set()
    for kind in spec.media_types:
        sizes = size_set(kind, options, spec, dims)
        for number, size in enumerate(sizes.sizes):
            sides = zip(sizes.heights[:, number].tolist(), sizes.widths[:, number].tolist(), strict=True)
            lengths = (
                {1} if kind == "image" else {round_frames(frames, spec, dims) for frames in range(size.frames + 1)}
            )
            lengths = {length for length in lengths if kind == "image" or length >= spec.plan.frame_rule.fewest}
            shapes |= {(length, *side) for side in sides for length in lengths}
    if options.tokens_per_batch is None:
        return len(shapes) * options.train_batch_size
    fewest = min(spec.model.sequence_tokens(ClipShape(frames=f, height=h, width=w), dims) for f, h, w in shapes)
    return len(shapes) * max(1, options.tokens_per_batch // fewest)
