"""`python -m fewbit_hooks profile NAME`."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    text = (
        "Print what autograd keeps of one training step, whose it is, and what few bits would free. The model is built "
        "from its configuration, with random weights and without dropout of attention probabilities; nothing is "
        "downloaded."
    )
    parser = commands.add_parser("profile", help="what a model's step keeps, and what few bits free", description=text)
    add = parser.add_argument
    add(
        "name",
        metavar="NAME",
        help="a model such as roberta-base, gpt2, vit-base, convnext-tiny, resnet-50, t5-small, whisper-tiny; a model "
        "type of transformers, such as bert; a model of timm; or package.module:function, a function that returns a "
        "model and a batch",
    )
    add("--batch", type=_positive, default=2, metavar="N", help="default: 2")
    add(
        "--length",
        type=_positive,
        default=512,
        metavar="N",
        help="tokens, or frames of sound. Default: 512, or all it takes",
    )
    add("--image", type=_positive, metavar="N", help="pixels a side. Default: the model's own")
    add("--layers", type=_positive, metavar="N", help="fewer layers than the model has, which suffice to see its kind")
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    add("--device", type=_device, default="cpu", help="as torch.device takes it. Default: cpu")
    add("--bits", type=int, choices=range(1, 9), default=3, metavar="N", help="of the table. Default: 3")
    add("--recompute", action="store_true", help="of the table, too: what can be computed again is not kept")
    add("--plot", type=_picture, metavar="PATH", help="draw it, too: .png, .svg or .pdf")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print markdown")
    form.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Build the model, profile it, print."""
    from ._profile import profile
    from ._profile_inputs import Sizes
    from ._profile_models import build, explained

    sizes = Sizes(options.batch, options.length, options.image, options.layers, DTYPES[options.dtype])
    model, batch = build(options.name, sizes)
    if options.device != "cpu" and hasattr(model, "to"):
        model, batch = model.to(options.device), _to(batch, options.device)
    given = (model, batch) if batch is not None else (model,)
    given_by_us = ":" not in options.name  # a function's model is its author's, who needs the traceback
    with explained(*_failure(options, model, batch)) if given_by_us else contextlib.nullcontext():
        result = profile(*given, bits=options.bits, recompute=options.recompute)
    if options.plot:
        result.plot(options.plot)
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print(result.to_markdown() if options.markdown else result)
        if given_by_us:
            print(f"\n{_what_ran(model, batch)}" if options.markdown else _what_ran(model, batch))
    return 0


def _failure(options: argparse.Namespace, model: Any, batch: Any) -> tuple[str, str, str]:
    """What to say if the model's forward raises."""
    from ._profile_inputs import FROM_PYTHON

    what = f"the forward of {_what_ran(model, batch)}, raised"
    return options.name, what, f"--length, --image and --dtype give it others; or {FROM_PYTHON}"


def _what_ran(model: Any, batch: Any) -> str:
    """`BertForSequenceClassification, given input_ids 2 x 512, labels 2`."""
    from ._profile_inputs import describe

    return f"{type(model).__name__}, given {describe(batch)}"


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text}")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from error
    return text


def _to(batch: Any, device: str) -> Any:
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_to(value, device) for value in batch]
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more, got {text}")
    return int(text)
