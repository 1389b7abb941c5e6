"""Writes what in docs/ is made by a program: the activations and their errors, the tables of memory, the pictures.

python docs/make.py
"""

from __future__ import annotations

from pathlib import Path

import fewbit_hooks as fewbit
import page_coverage
import page_memory
import page_operations
import page_speed
from fewbit_hooks import Activation
from fewbit_hooks._built_in import built_in
from fewbit_hooks._mask_calls import mask_calls

DOCS = Path(__file__).parent

HEAD = """\
# The recognised activations

This page is written by `docs/make.py` from the registry, `fewbit_hooks.activations()`; `python -m fewbit_hooks doctor`
prints the same for your installation. `torch.ops.aten.f` stands for the packet and its overloads.

*Exact* ones have a derivative of two values: 1 bit an element, and a gradient that is bit for bit stock PyTorch's.
*Folded* ones have an even derivative: |x| is coded, at 3 to 6 times less error for the same bits.
"""

ERRORS = """\

## Error by bits

`codebook(name, bits).error`: the integral over [-10, 10] of the squared difference between the derivative and its
quantisation, the convention of the paper (arXiv:2202.00441). Each is the optimum. The paper's table has the same digits
for gelu, silu, sigmoid, tanh, selu and softplus at 1 to 4 bits, but for silu at 2 bits (0.0479) and selu at 1 bit
(0.2554), where the optimum is lower by one in the last digit.
"""

MASKS = """\

## Masks

They are no activations, and there is nothing to approximate: what these calls save as a mask (a boolean tensor, or on
the CPU a dropout's noise of 0 and one other value) takes 1 bit an element, and the gradient, the second one too, is
bit for bit stock PyTorch's. `bits={"dropout": None}` turns one off.

| mask | calls |
| --- | --- |
"""

MASKS_KEPT = """
A mask that you hold (the causal mask that all layers are given) stays as it is: codes would come on top. One that is
made for the call, `scores.masked_fill(mask == 0, -inf)`, is packed once nobody else holds it. Dropout's noise of floats
on CUDA (`alpha_dropout`) is kept: the host would have to wait to see that it has two values.
"""

COMPOSITES = """\

## Composites

Modules that compute an activation or a norm from primitives save several tensors of its size. They are known by their
class, and run as one node: their own forward, unrecorded, bit for bit. What is kept of an activation is what is kept of
any other: codes, or a bit beside the output; with `exact=True` the input, from which the forward is run again. Norms
are run again, exactly, under `recompute=True`. [`fewbit_hooks.register_module`](quickstart.md#a-module-of-your-own)
teaches yours.

| as | classes |
| --- | --- |
"""

KEPT = """\

## Known, and kept exact

`prelu` (the gradient of its weight needs the true input), `rrelu` (random slopes), `glu` (the gradient of its values
needs the true gate), `clamp` with tensor limits, any call with `out=`. The report names them and says why.

Anything else pointwise: [`fewbit_hooks.register`](quickstart.md#a-function-of-your-own).
"""


def activations_page() -> str:
    """The text of activations.md."""
    lines = [HEAD, "| activation | parameters | saves | bits | calls |", "| --- | --- | --- | --- | --- |"]
    lines += [_line(activation) for activation in fewbit.activations()]
    lines += [ERRORS, "| | " + " | ".join(f"{bits}" for bits in range(1, 9)) + " |", "| --- |" + " ---: |" * 8]
    for activation in fewbit.activations():
        if not activation.exact:
            lines.append(_errors(activation.name))
            if activation.name == "gelu":
                lines.append(_errors("gelu", approximate="tanh"))
    masks = [
        f"| **{name}** | " + ", ".join(f"`{call}`" for call in calls) + " |" for name, calls in mask_calls().items()
    ]
    composites = [
        f"| **{name}** | " + ", ".join(f"`{cls}`" for cls in classes) + " |" for name, classes in built_in().items()
    ]
    return "\n".join([*lines, MASKS + "\n".join(masks), MASKS_KEPT + COMPOSITES + "\n".join(composites), KEPT])


def _line(activation: Activation) -> str:
    parameters = ", ".join(f"{name}={default!r}" for name, default in activation.parameters.items())
    bits = "1, exact" if activation.exact else "1-8, folded" if activation.even else "1-8"
    calls = ", ".join(f"`{call}`" for call in activation.calls)
    return f"| **{activation.name}** | {parameters} | {activation.saves} | {bits} | {calls} |"


def _errors(name: str, **parameters: str) -> str:
    title = name + "".join(f" ({value})" for value in parameters.values())
    cells = [f"{fewbit.codebook(name, bits, **parameters).error:.3g}" for bits in range(1, 9)]
    return f"| {title} | " + " | ".join(cells) + " |"


def main() -> None:
    (DOCS / "memory.md").write_text(page_memory.memory_page(), encoding="utf-8")
    for page in (DOCS / "faq.md", DOCS.parent / "README.md"):
        page.write_text(page_memory.with_short_table(page), encoding="utf-8")
    (DOCS / "speed.md").write_text(page_speed.speed_page(), encoding="utf-8")
    page_speed.draw()
    (DOCS / "operations.md").write_text(page_operations.operations_page(), encoding="utf-8")
    (DOCS / "coverage.md").write_text(page_coverage.coverage_page(), encoding="utf-8")
    (DOCS / "activations.md").write_text(activations_page(), encoding="utf-8")
    for name, bits in (("gelu", 3), ("silu", 2)):
        fewbit.codebook(name, bits).plot(DOCS / "images" / f"{name}-{bits}-bits.png")


if __name__ == "__main__":
    main()
