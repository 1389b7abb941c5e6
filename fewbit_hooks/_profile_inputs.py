"""A random batch for a model of transformers: what its forward asks for, by name, in its configuration's sizes.

What a model asks for it says itself: `main_input_name`, the parameters of its forward that have no default, and
`input_modalities`. How large each is, its configuration says, under the names that transformers uses for it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._errors import FewbitError

MODALITIES = {
    "text": ("input_ids",),
    "image": ("pixel_values",),
    "video": ("pixel_values_videos", "pixel_values"),
    "audio": ("input_features", "input_values"),
    "time": ("past_values",),
}
"""What a model's input of a kind is called: the first of these that its forward takes."""

FROM_PYTHON = "build the model and a batch of your own, and call fewbit_hooks.profile(model, batch) from Python"

SAMPLES = 320
"""Samples of sound a frame, where the configuration does not say: 20 ms at 16 kHz, wav2vec 2.0's."""

IMAGE = 224
FRAMES = 8
"""Pixels a side and frames of a video, where the configuration does not say."""


@dataclass(frozen=True)
class Sizes:
    """Of the batch and the model; None where the model's own is taken."""

    batch: int = 2
    length: int = 512
    image: int | None = None
    layers: int | None = None
    dtype: torch.dtype = torch.bfloat16


def make_batch(model: Any, config: Any, sizes: Sizes) -> dict[str, Tensor]:
    """A random tensor for each argument that the forward of `model` needs, and labels where they are classes or tokens.

    Raises:
        FewbitError: it needs another.
    """
    needed = _needed(model, config)
    if missing := [name for name in needed if name not in _MAKERS]:
        raise FewbitError(
            f"the forward of {type(model).__name__} asks for {' and '.join(missing)}, of which no random one can be "
            f"made here; {FROM_PYTHON}"
        )
    made = _Inputs(model, config, sizes)
    batch = {name: _MAKERS[name](made) for name in needed}
    parameters = inspect.signature(model.forward).parameters
    if "Classification" in type(model).__name__:
        batch["labels"] = torch.zeros(sizes.batch, dtype=torch.long)
    elif "labels" in parameters and model.get_output_embeddings() is not None:
        batch["labels"] = batch["input_ids"] if "input_ids" in batch else made.target_tokens()
    elif config.is_encoder_decoder and "decoder_input_ids" in parameters:
        batch["decoder_input_ids"] = made.target_tokens()
    return batch


def describe(batch: Any) -> str:
    """A batch in a line: `input_ids 2 x 512, labels 2`."""
    named = batch.items() if isinstance(batch, dict) else [("a tensor of", batch)]
    return ", ".join(f"{name} {' x '.join(map(str, t.shape))}" for name, t in named) or "nothing"


def _needed(model: Any, config: Any) -> list[str]:
    """The names of the arguments without which the forward does not run."""
    parameters = inspect.signature(model.forward).parameters.values()
    taken = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in parameters if p.name in taken and p.default is p.empty]
    main = [name for name in _each(model.main_input_name) if name in taken]
    needed += [name for name in main if name in _MAKERS]
    if not _has_placeholders(config):
        for modality in _each(model.input_modalities):
            needed += [name for name in MODALITIES.get(modality, ()) if name in taken][:1]
    # of Perceiver's `inputs`, which may be anything, none can be made, but of the tokens that it takes in their place
    return list(dict.fromkeys(needed or [name for name in taken if name in _MAKERS] or main))


def _has_placeholders(config: Any) -> bool:
    """Images and sounds have tokens of theirs among the text, as many as the model's processor puts there; without
    them it takes text alone."""
    names = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    return any(hasattr(part, name) for part in _configs(config) for name in names)


def _each(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


class _Inputs:
    """Makes them. Sizes that several share are looked up once."""

    def __init__(self, model: nn.Module, config: Any, sizes: Sizes) -> None:
        self._model = model
        self._config = config
        self._sizes = sizes

    @functools.cached_property
    def length(self) -> int:
        """Of a text."""
        longest: int = self._find("max_position_embeddings", "n_positions", default=0, first="text")
        if longest <= 0:  # XLNet's is -1: any
            return self._sizes.length
        return min(longest - _rows_before_the_first_position(self._model), self._sizes.length)

    def tokens(self) -> Tensor:
        """The ids of a text, the last of which ends it: some models look for that one."""
        vocabulary = self._find("vocab_size", default=5, first="text")
        ids = torch.randint(min(4, vocabulary - 1), vocabulary, (self._sizes.batch, self.length))
        end = self._find("eos_token_id", default=None, first="text")
        if isinstance(end, int) and end < vocabulary:
            ids[:, -1] = end
        return ids

    def target_tokens(self) -> Tensor:
        """Those of what is to be generated."""
        return self.tokens()[:, : self._find("max_target_positions", default=self.length)]

    def pixels(self) -> Tensor:
        """Images; or videos, of a model that knows frames."""
        frames = self._find("num_frames", "frames_per_clip", default=None, first="vision")
        return self._pixels(() if frames is None else (frames,))

    def video(self) -> Tensor:
        """Frames of images."""
        return self._pixels((self._find("num_frames", "frames_per_clip", default=FRAMES, first="vision"),))

    def _pixels(self, frames: tuple[int, ...]) -> Tensor:
        image = self._sizes.image or self._find("image_size", default=IMAGE, first="vision")
        size = (image, image) if isinstance(image, int) else tuple(image)
        return self._random(*frames, self._find("num_channels", default=3, first="vision"), *size)

    def wave(self) -> Tensor:
        """Samples of sound, with a dimension of channels where a codec takes them; or a spectrogram of a set length."""
        bins, frames = self._find("num_mel_bins", default=None), self._find("max_length", default=None)
        if bins is not None and frames is not None:
            return self._random(frames, bins)
        hop, channels = self._find("hop_length", default=None), self._find("audio_channels", default=None)
        samples = self._sizes.length * (self._find("inputs_to_logits_ratio", default=None) or hop or SAMPLES)
        return self._random(samples) if hop is None and channels is None else self._random(channels or 1, samples)

    def spectrogram(self) -> Tensor:
        """Frames of features; a model with a set number of positions takes the features first, as Whisper does."""
        names = "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel"
        features = self._find(*names, default=80, first="audio")
        positions = self._find("max_source_positions", default=None, first="audio")
        if positions is not None and self._find("num_mel_bins", default=None, first="audio") is not None:
            return self._random(features, 2 * positions)
        return self._random(self._sizes.length, features)

    def series(self) -> Tensor:
        """What is known of a time series."""
        return self._random(self._find("context_length", default=self._sizes.length), self._channels)

    @property
    def _channels(self) -> int:
        return int(self._find("num_input_channels", default=1))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(self._sizes.batch, *shape, dtype=self._sizes.dtype)

    def _find(self, *names: str, default: Any, first: str = "") -> Any:
        """The first of these attributes that the configuration has, or that of a part."""
        for config in _configs(self._config, first):
            for name in names:
                if (value := getattr(config, name, None)) is not None:
                    return value() if callable(value) else value
        return default


def _rows_before_the_first_position(model: nn.Module) -> int:
    """RoBERTa and its like count positions from the one after padding's."""
    tables = (m for name, m in model.named_modules() if "position" in name and isinstance(m, nn.Embedding))
    return max((t.padding_idx + 1 for t in tables if t.padding_idx is not None), default=0)


def _configs(config: Any, first: str = "") -> Iterator[Any]:
    """That of the part asked for, the whole one, those of the other parts and of theirs."""
    order = (f"{first}_config", "", *getattr(config, "sub_configs", ()))
    for name in dict.fromkeys(order):
        if not name:
            yield config
        elif (part := getattr(config, name, None)) is not None:
            yield from _configs(part)


_MAKERS: dict[str, Callable[[_Inputs], Tensor]] = {
    "input_ids": _Inputs.tokens,
    "pixel_values": _Inputs.pixels,
    "pixel_values_videos": _Inputs.video,
    "input_values": _Inputs.wave,
    "input_features": _Inputs.spectrogram,
    "past_values": _Inputs.series,
}
