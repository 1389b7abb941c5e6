"""Write fewbit_hooks/codebooks.json anew: python -m tests.regenerate_codebooks (some 10 s)."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import fewbit_hooks
from fewbit_hooks._activations import find
from fewbit_hooks._catalog import as_weight, compute
from fewbit_hooks._codebook import Codebook

# fmt: off
SMOOTH = ("celu", "elu", "gelu", "hardswish", "logsigmoid", "mish", "quick_gelu", "selu", "sigmoid", "silu", "softplus",
          "softsign", "tanh", "tanhshrink")
# fmt: on
PATH = Path(fewbit_hooks.__file__).with_name("codebooks.json")


def defaults() -> Iterator[Codebook]:
    """The smooth activations with PyTorch's parameters, gelu with the other formula too, at 1 to 8 bits."""
    wanted = [(name, {}) for name in SMOOTH] + [("gelu", {"approximate": "tanh"})]
    for name, parameters in sorted(wanted, key=str):
        activation = find(name)
        for bits in range(1, 9):
            yield compute(activation, bits, as_weight("uniform"), activation.check(parameters))


def text(books: Iterable[Codebook]) -> str:
    return "[\n" + ",\n".join(book.to_json() for book in books) + "\n]\n"


if __name__ == "__main__":
    PATH.write_text(text(defaults()), encoding="utf-8")
    print(f"wrote {PATH}")
