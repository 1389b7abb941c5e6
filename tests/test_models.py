"""What a real model's graph holds, counted from outside."""

from __future__ import annotations

import pytest
import torch

import fewbit_hooks as fewbit

from .conftest import held_for_backward

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


# all of it takes minutes on a CPU without bfloat16; its layers are alike
@pytest.mark.parametrize(("layers", "images"), [(4, 2), pytest.param(12, 4, marks=pytest.mark.slow)])
def test_a_vit_base_holds_19_percent_fewer_bytes_at_3_bits(layers: int, images: int) -> None:
    config = transformers.ViTConfig(num_hidden_layers=layers)
    model = transformers.ViTForImageClassification(config).to(torch.bfloat16).train()
    parameters = list(model.parameters())
    pixels = torch.randn(images, 3, 224, 224, dtype=torch.bfloat16)
    batch = {"pixel_values": pixels, "labels": torch.arange(images) % 2}

    exact = model(**batch).loss
    stock = sum(held_for_backward(exact, parameters).values())
    with fewbit.scope(bits=3) as memory:
        loss = model(**batch).loss
    few = sum(held_for_backward(loss, parameters).values())

    assert torch.equal(loss, exact)
    assert few <= 0.81 * stock
    report = memory.report()
    rows = 64 * 1024  # the decoding table, which the packed objects share
    assert stock - few == pytest.approx(report.freed_bytes - report.stored_bytes, abs=rows)
    assert {(row.activation, row.reason) for row in report.rows} == {("gelu", "")}
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
