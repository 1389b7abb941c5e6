"""The pretrained MiniLM on movie reviews: the whole demo, and its gradients against the exact ones. Fetches 86 MB."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbit_hooks as fewbit
from fewbit_hooks._demo import _runs, _summary
from fewbit_hooks._demo._fetch import cache_folder
from fewbit_hooks._demo._reviews import fetch_reviews, read_reviews
from fewbit_hooks._demo._task import Settings, load
from fewbit_hooks._demo._training import Result

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def fetched() -> tuple[Path, Path]:
    pytest.importorskip("transformers")
    try:
        return fetch_reviews(cache_folder())
    except fewbit.FewbitError as reason:
        pytest.skip(str(reason))


def test_the_sentences_are_those_that_were_counted(fetched: tuple[Path, Path]) -> None:
    sentences, labels = read_reviews(fetched[1])
    assert (sum(labels), len(labels) - sum(labels)) == (4982, 5061)
    assert sentences[1].startswith("The gorgeously elaborate continuation of ''The Lord of the Rings''")
    assert sum("cliché" in sentence for sentence in sentences) > 10


def test_gradients_of_few_bits_are_near_the_exact_ones(fetched: tuple[Path, Path]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model_folder, archive = fetched
    sentences, labels = (part[:32] for part in read_reviews(archive))
    batch = AutoTokenizer.from_pretrained(model_folder)(sentences, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2).eval()
    gelu = [{"gelu": bits} for bits in (1, 2, 3, 4)]  # and not the tanh of the pooler
    result = fewbit.compare(lambda: model(**batch, labels=torch.tensor(labels)).loss, gelu, min_bytes=0)
    print(result)
    assert result.repeat_error == 0
    assert {row.loss for row in result.rows} == {result.exact_loss}
    for row, cosine, error in zip(
        result.rows, (0.983, 0.9978, 0.9992, 0.9999), (0.18, 0.067, 0.043, 0.019), strict=True
    ):
        assert row.cosine >= cosine, result
        assert row.relative_error <= error, result


def test_fine_tuning_with_few_bits_is_as_good_and_holds_a_tenth(
    fetched: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    results: list[Result] = []
    monkeypatch.setattr(_summary, "show", lambda task, settings, shown: results.extend(shown))
    settings = Settings(task="reviews", output=tmp_path / "reviews.png")
    _runs.demo(settings)
    stock, three, two = results
    _summary.Console().print(_summary._table(results, cuda=False))
    _summary.draw(load(settings).title, results, settings.output)
    assert stock.losses[0] == three.losses[0] == two.losses[0]
    assert stock.accuracy > 0.76
    assert three.accuracy > stock.accuracy - 0.015
    assert two.accuracy > stock.accuracy - 0.02
    assert stock.original_bytes == three.freed_bytes == two.freed_bytes > 40 * 2**20
    for result in (three, two):  # the next Linear keeps gelu's output: one bit beside it, where stock keeps 32
        assert result.held_bytes * 32 == result.original_bytes
        assert stock.peak_bytes - result.peak_bytes > 0.5 * (result.original_bytes - result.held_bytes)
