"""Speech features per video frame from a wav2vec 2.0 folder, as Wan-S2V reads them."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.wav2vec2 import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from vfun_cli.modeling.encoders.frozen import Output
from vfun_cli.modeling.encoders.placement import freeze
from vfun_cli.modeling.encoders.pretrained import load_model
from vfun_cli.modeling.foreign import from_folder
from vfun_cli.modeling.transfer import upload

FOLDER = "wav2vec2-large-xlsr-53-english"
FEATURE_RATE = 50
"""wav2vec 2.0 makes one feature per 320 samples at 16 kHz."""
VIDEO_RATE = 30
"""Features are resampled to this rate before each frame of the clip takes one."""
UNUSED = ("wav2vec2.masked_spec_embed",)
"""Read only by SpecAugment in wav2vec's own training; some released files leave it out."""


class SpeechEncoder(nn.Module):
    """Mono waveforms to hidden states of every layer, in float32 always."""

    def __init__(self, model: Wav2Vec2ForCTC, extractor: Wav2Vec2FeatureExtractor) -> None:
        super().__init__()
        self.model = freeze(model.float())
        self.extractor = extractor

    @classmethod
    def from_folder(cls, folder: Path) -> "SpeechEncoder":
        """A transformers folder with Wav2Vec2ForCTC and its feature extractor, offline.

        Raises:
            CheckpointError: the folder is incomplete, or its weights do not fit its configuration.
        """
        model = load_model(Wav2Vec2ForCTC, folder, dtype=torch.float32, unused=UNUSED)
        return cls(model, from_folder(Wav2Vec2FeatureExtractor, folder))

    @property
    def sample_rate(self) -> int:
        """Samples per second that ``waveform`` arguments need."""
        return int(self.extractor.sampling_rate)

    @property
    def dim(self) -> int:
        """Width of a hidden state."""
        return int(self.model.config.hidden_size)

    @property
    def num_states(self) -> int:
        """Hidden states of one feature: the embedding and every layer."""
        return int(self.model.config.num_hidden_layers) + 1

    def hidden_states(self, waveform: Tensor) -> Tensor:
        """[layers + 1, T, hidden] at 50 Hz of one clip's mono waveform [samples] float32.

        The waveform is normalised over the clip (the folder's setting). The last entry is the output AFTER the
        encoder's final LayerNorm, as transformers 4 returned it and as the released S2V weights expect;
        transformers 5 puts the value before the LayerNorm into ``hidden_states``.
        """
        inputs = self.extractor(
            waveform.cpu().numpy(), sampling_rate=self.sample_rate, return_tensors="pt"
        ).input_values
        with torch.no_grad():
            output = self.model.wav2vec2(upload(inputs.float(), self.model.device), output_hidden_states=True)
        return torch.cat([*output.hidden_states[:-1], output.last_hidden_state])

    def features_30hz(self, waveform: Tensor) -> Tensor:
        """Hidden states resampled linearly from 50 to 30 Hz, [layers + 1, L, hidden], L = floor(T * 30 / 50)."""
        states = self.hidden_states(waveform)
        length = states.shape[1] * VIDEO_RATE // FEATURE_RATE
        resampled = nn.functional.interpolate(
            states.transpose(1, 2), size=length, mode="linear", align_corners=True
        )  # [layers + 1, hidden, L]
        return resampled.transpose(1, 2)

    def encode(self, waveform: Tensor, *, fps: Fraction, frames: int) -> Tensor:
        """[frames, layers + 1, hidden] of a clip of ``frames`` frames at ``fps`` and its sound of the same length."""
        return align_to_frames(self.features_30hz(waveform), fps=fps, frames=frames)

    def outputs(self, inputs: Sequence[tuple[Tensor, Fraction, int]]) -> list[Output]:
        """``features`` [frames, layers + 1, hidden] of each (waveform, frames a second, frames)."""
        return [{"features": self.encode(waveform, fps=fps, frames=frames)} for waveform, fps, frames in inputs]


def align_to_frames(features: Tensor, *, fps: Fraction, frames: int) -> Tensor:
    """One feature of [layers, L, hidden] at 30 Hz for each video frame: [frames, layers, hidden].

    Frame k shows at k / fps seconds and takes the feature nearest to that time, half to even. A frame later than the
    last feature gets zeros: wav2vec makes its last feature up to 25 ms before the sound ends.
    The rule is that of the original's ``get_audio_embed_bucket_fps``, with the exact frame rate (docs/numerics.md,
    Conditions).

    Raises:
        ValueError: the sound is longer than the clip: the original returns a multiple of the frames then, and the model
            reads them shifted.
    """
    length = features.shape[1]
    if Fraction(length, VIDEO_RATE) > frames / fps:
        raise ValueError(
            f"{length / VIDEO_RATE:.3f} s of sound do not belong to a clip of {frames} frames at {float(fps):.3f} fps, "
            f"{float(frames / fps):.3f} s"
        )
    duration = float(frames / fps)
    # The product with numpy's linspace decides ties at .5 as the released model saw them; round(30 k / fps) does not.
    times = np.linspace(0, duration, frames, endpoint=False)
    last = math.ceil(frames / fps * VIDEO_RATE) - 1
    indices = np.minimum(np.round(VIDEO_RATE * times), last).astype(np.int64)
    there = torch.from_numpy(indices[indices < length])  # a beginning of the clip, known on the host
    aligned = features[:, upload(there, features.device)].transpose(0, 1)
    return nn.functional.pad(aligned, (0, 0, 0, 0, 0, frames - len(there)))
