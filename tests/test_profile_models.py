"""Models of transformers by type name: a batch of what each asks for, or an error in a line."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import FewbitError, _profile_models
from fewbit_hooks.__main__ import main
from fewbit_hooks._profile_inputs import Sizes, describe

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 512, "max_position_embeddings": 64}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
}
STARTS = {"pad_token_id": 0, "decoder_start_token_id": 1}
CONVOLUTIONS = {"conv_dim": [8, 8], "conv_kernel": [4, 2], "conv_stride": [4, 2], "num_conv_pos_embedding_groups": 2}
SOUND = {**SIZES, **CONVOLUTIONS, "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
CODEC = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16, "upsampling_ratios": [4, 2]}
VIDEO = {**IMAGE, "num_frames": 4, "tubelet_size": 2, "decoder_hidden_size": 32, "decoder_num_attention_heads": 4}
SPECTROGRAM = {**SIZES, "max_length": 32, "num_mel_bins": 16, "patch_size": 8}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
TWO_TOWERS = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}
LATENTS = {"num_latents": 4, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 1}
SAYS_LESS = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 64}

# model type, settings, and the batch, with 2 examples of 16 tokens or frames
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("wav2vec2", SOUND, "input_values 2 x 128"),
    ("hubert", SOUND, "input_values 2 x 128"),
    ("speecht5", {**BOTH, **SOUND}, "input_values 2 x 128, labels 2 x 16"),
    ("wav2vec2-bert", SIZES, "input_features 2 x 16 x 160"),
    ("encodec", CODEC, "input_values 2 x 1 x 128"),
    ("audio-spectrogram-transformer", SPECTROGRAM, "input_values 2 x 32 x 16, labels 2"),
    ("speech_to_text", BOTH, "input_features 2 x 16 x 80, labels 2 x 16"),
    ("whisper", {**BOTH, **STARTS, "max_source_positions": 12}, "input_features 2 x 80 x 24, labels 2 x 16"),
    ("xlnet", SAYS_LESS, "input_ids 2 x 16, labels 2 x 16"),
    ("bart", BOTH, "input_ids 2 x 16, labels 2"),
    ("t5", {**BOTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, "input_ids 2 x 16, labels 2 x 16"),
    ("roberta", {**TEXT, "max_position_embeddings": 12}, "input_ids 2 x 10, labels 2"),
    ("detr", {**BOTH, "backbone_config": {**RESNET, "out_features": ["stage2"]}}, "pixel_values 2 x 3 x 224 x 224"),
    ("perceiver", {**LATENTS, "vocab_size": 64, "max_position_embeddings": 16}, "input_ids 2 x 16, labels 2"),
    ("esm", {**TEXT, "vocab_size": None, "position_embedding_type": "rotary"}, "input_ids 2 x 16, labels 2"),
    ("chinese_clip", TWO_TOWERS, "input_ids 2 x 16, pixel_values 2 x 3 x 16 x 16"),
    ("videomae", VIDEO, "pixel_values 2 x 4 x 3 x 16 x 16, labels 2"),
    ("siglip_text_model", TEXT, "input_ids 2 x 16"),
    ("patchtst", {"context_length": 64, "num_input_channels": 3}, "past_values 2 x 64 x 3"),
]


def build(model_type: str, settings: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = Sizes(batch=2, length=16, dtype=torch.float32)
    return _profile_models._from_transformers(model_type, model_type, settings, sizes)


@pytest.mark.filterwarnings("ignore")  # of transformers, when it makes a model
@pytest.mark.parametrize(("model_type", "settings", "batch"), CASES, ids=[name for name, *_ in CASES])
def test_a_model_is_given_what_its_forward_asks_for(model_type: str, settings: dict[str, Any], batch: str) -> None:
    model, given = build(model_type, settings)
    assert describe(given) == batch
    assert fewbit.profile(model, given, min_bytes=0).nbytes > 0


def test_no_layer_is_dropped_at_random() -> None:
    model, batch = build("wav2vec2", {**SOUND, "layerdrop": 1.0})
    modules = {row.module for row in fewbit.profile(model, batch).rows}
    assert any("encoder.layers.1." in module for module in modules)


def named(monkeypatch: pytest.MonkeyPatch, model_type: str, settings: dict[str, Any]) -> list[str]:
    """The command for a tiny model of a type."""
    monkeypatch.setitem(_profile_models.PUBLISHED, "tiny", (model_type, settings))
    return ["profile", "tiny", "--length", "16"]


@pytest.mark.filterwarnings("ignore")
def test_the_text_ends_with_what_ran(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = "BertForSequenceClassification, given input_ids 2 x 16, labels 2"
    for form in [], ["--markdown"]:
        assert main([*named(monkeypatch, "bert", TEXT), *form]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == ran


@pytest.mark.parametrize(
    ("model_type", "settings", "said"),
    [
        ("bros", TEXT, "the forward of BrosModel, given input_ids 2 x 16, raised: ValueError: You have to sp"),
        ("bert", {"num_attention_heads": 5}, "transformers does not build it from a configuration of defaults: V"),
        ("decision_transformer", {}, "the forward of DecisionTransformerModel asks for states, of which "),
        ("sam_prompt_encoder", {}, "transformers has no class for it alone; "),
    ],
)
def test_what_cannot_be_profiled_is_an_error_in_a_line(
    model_type: str,
    settings: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(named(monkeypatch, model_type, settings)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fewbit: profile tiny: ")
    assert said in line
    assert "fewbit_hooks.profile(model, batch) from Python" in line


def test_a_model_that_does_not_fit_into_memory_is_not_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=2**16))
    assert main(named(monkeypatch, "bert", TEXT)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "0.0 billion parameters need" in line
    assert "of which 64.0 KiB are free; --layers 2 builds fewer layers" in line


def test_an_error_of_a_function_s_model_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        main(["profile", f"{__name__}:broken"])


def broken() -> tuple[Any, Tensor]:
    return lambda x: x / (1 // 0), torch.zeros(1)


def test_the_error_of_a_missing_package_names_it() -> None:
    with pytest.raises(FewbitError, match="ImportError: it requires the timm library; build"):
        _raise(ImportError("\nit requires the timm library.\nInstall it so: ..."))


def _raise(error: Exception) -> None:
    with _profile_models.explained("detr", "it is not built", _profile_models.FROM_PYTHON):
        raise error
