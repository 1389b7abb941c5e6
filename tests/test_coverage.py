"""Other people's cases: PyTorch's own samples, and architectures of transformers. All of them: benchmarks/."""

from __future__ import annotations

import pytest
import torch

import pytorch_cases

architectures = pytest.importorskip("architectures", reason="transformers is not installed", exc_type=ImportError)

# Where nothing is recognised a scope has nothing to compress, and says so; the models warn of what they will.
pytestmark = [pytest.mark.filterwarnings("ignore")]

OLD = torch.__version__.startswith("2.11.")
"""Every twelfth case of modules is 134 there, and 226 in torch 2.13."""


@pytest.mark.parametrize("suite", pytorch_cases.SUITES)
def test_every_twelfth_of_pytorchs_own_cases(suite: str) -> None:
    for counts in pytorch_cases.count(pytorch_cases.SUITES[suite](12)).values():
        assert counts.wrong == []
        assert counts.outcomes["equal"] > (100 if OLD else 200)


@pytest.mark.slow
@pytest.mark.parametrize("suite", pytorch_cases.SUITES)
def test_all_of_pytorchs_own_cases(suite: str) -> None:
    for counts in pytorch_cases.count(pytorch_cases.SUITES[suite](1)).values():
        assert counts.wrong == []


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_an_architecture_trains_as_ever_and_holds_no_more(name: str) -> None:
    for setting, outcome in architectures.measure(name).items():
        assert outcome.loss_equal
        assert outcome.held <= 1
        assert outcome.gradients <= (0 if "exact=True" in setting else 0.08)
