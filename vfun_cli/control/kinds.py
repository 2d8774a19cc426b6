"""What a control clip can show, and what each kind needs."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from vfun_cli.devices import require_package
from vfun_cli.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to make a control clip."""

    drawing: str
    """``module:function`` that makes of :class:`Settings` what makes of a frame [h, w, 3] another, both uint8."""
    packages: Mapping[str, str]
    """What it imports beside vfun's own packages, and what is installed for that."""
    model: str | None = None
    """What ``--model`` must hold; None: it has no weights."""
    released: str | None = None
    """A repository of the Hugging Face hub that has one, and the files of it that are read; none: all."""


KINDS: Mapping[str, Kind] = {
    "canny": Kind(drawing="vfun_cli.control.canny:canny", packages={"cv2": "opencv-python-headless"}),
    "depth": Kind(
        drawing="vfun_cli.control.depth:depth",
        packages={"transformers": "transformers"},
        model="a Depth Anything or DPT model as transformers saves it",
        released="depth-anything/Depth-Anything-V2-Small-hf",
    ),
    "pose": Kind(
        drawing="vfun_cli.control.pose:pose",
        packages={"cv2": "opencv-python-headless", "rtmlib": "rtmlib", "onnxruntime": "onnxruntime"},
        model="DWPose's yolox_l.onnx and dw-ll_ucoco_384.onnx, or others of rtmlib's",
        released="yzd-v/DWPose yolox_l.onnx dw-ll_ucoco_384.onnx",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what a clip becomes."""

    kind: str
    low: int = 100
    high: int = 200
    blur: float = 0.0
    """Pixels: the standard deviation of the Gaussian before the edges are looked for; 0: none."""
    model: str | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        """What a clip says of how it was made; where its model lies and what ran it say nothing of it."""
        if self.model is None:
            return f"vfun make-control {self.kind} low={self.low} high={self.high} blur={self.blur:g}"
        return f"vfun make-control {self.kind} model={_fingerprint(Path(self.model))}"

    def to_json(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, stated: dict[str, Any]) -> Self:
        """The same again."""
        return cls(**stated)


def find(name: str) -> Kind:
    """The kind of that name, whose packages are installed.

    Raises:
        ConfigError: there is none.
        EnvironmentFault: a package is missing.
    """
    if name not in KINDS:
        raise ConfigError(
            f"--kind is {name!r}; choose one of: {', '.join(KINDS)}.{did_you_mean(name, KINDS)}", option="--kind"
        )
    for module, package in KINDS[name].packages.items():
        require_package(f"--kind {name}", module, install=package)
    return KINDS[name]


def _fingerprint(model: Path) -> str:
    """Of the names, sizes and small contents of a model's files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in model.iterdir() if path.is_file() and not path.name.startswith(".")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
