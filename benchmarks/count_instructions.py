"""What the Triton kernels ask of a GPU, counted in what Triton compiles them to. It takes no GPU.

    python benchmarks/count_instructions.py [--quick] [--arch N] [--csv PATH] [KERNEL ...]

A GPU takes time for the bytes that are moved and for the instructions that are issued, whichever is longer; how long
either takes only a GPU can tell. An H200 issues 7 instructions in the time of a byte, an H100 10 (132 multiprocessors
of 128 lanes at 1.98 GHz; 4.8 and 3.35 TB/s): a kernel that needs more for each of its bytes is not bound by memory.

    instructions  of each element, those of paths that are seldom taken included (of a division, say)
    bytes         that must be read and written, of each element
    a byte        instructions by bytes
    shared        bytes of shared memory through which elements change places between threads
    registers     of a thread; a multiprocessor has 65,536
    spilled       bytes of a thread that are in memory because there are too few registers
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from about import versions
from fewbit_hooks.ops import _triton, _triton_fused, _triton_gated

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WARPS = 4  # Triton's default

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8, "bool": 1}
"""The dtypes; those of floats by the names that Triton gives them."""
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "mish", "elu", "softplus", "tanh", "sigmoid", "hardswish")
EVEN = ("tanh", "sigmoid")
"""Those whose derivative is even: their codes are of |x|."""


class Build(NamedTuple):
    """A kernel for one dtype.

    Attributes:
        kernel: Triton's function.
        variant: what is computed, and how the tensors lie.
        bytes: read and written, an element.
        constants: its constexpr arguments but GROUPS.
        types: of its other arguments.
    """

    kernel: Any
    dtype: str
    variant: str
    bytes: float
    constants: dict[str, Any]
    types: dict[str, str]

    @property
    def name(self) -> str:
        """As `ops` has it."""
        return str(self.kernel.__name__).removeprefix("_")


class Row(NamedTuple):
    """What one kernel asks for; see above."""

    kernel: str
    dtype: str
    variant: str
    bits: int
    instructions: float
    bytes: float
    a_byte: float
    shared: int
    registers: int
    spilled: int


def builds(dtypes: Iterable[str], bits: Iterable[int], n: str = "i32") -> Iterator[Build]:
    """Every kernel, for each of the dtypes.

    Args:
        bits: for those kernels that there are for several.
        n: the type of the number of elements; "": it is 1, of which Triton makes a constant. One is no whole group, and
            so codes are moved in bytes.
    """
    for dtype in dtypes:
        for kernel, variant, moved, constants, types in _of(dtype, bits):
            if n:
                yield Build(kernel, dtype, variant, moved, constants, {**types, "n": n})
            else:
                in_bytes = {name: "*u8" if name == "packed" else kind for name, kind in types.items()}
                yield Build(kernel, dtype, variant, moved, {**constants, "n": 1}, in_bytes)


def _of(dtype: str, bits: Iterable[int]) -> Iterator[tuple[Any, str, float, dict[str, Any], dict[str, str]]]:
    size = BYTES[dtype]
    x, as_bits, computed = f"*{dtype}", f"*i{8 * size}", "*fp64" if dtype == "fp64" else "*fp32"
    bit = {"packed": "*u8"}
    yield _triton._encode_not_zero, "", size + 1 / 8, {}, {**bit, "x": as_bits}
    if dtype == "bool":
        yield _triton._pack, "", size + 1 / 8, {"BITS": 1}, {**bit, "codes": "*u8"}
        yield _triton._decode, "", 1 / 8 + size, {"BITS": 1, "IN_ROW": 8}, {**bit, "values": as_bits, "out": as_bits}
        return

    for b in bits:
        code, packed, coded = b / 8, _pointer(b), {"BITS": b, "FOLDED": False, "FLAG": 2}
        looked_up = {"BITS": b, "IN_ROW": 4}
        types = {"x": x, "packed": packed, "boundaries": computed, "flag": computed}
        yield _triton._encode_thresholds, "", size + code, coded, types
        types = {"packed": packed, "values": as_bits, "out": as_bits}
        yield _triton._decode, "", code + size, looked_up, types
        types = {"grad": x, "packed": packed, "values": computed, "out": x}
        yield _triton._multiply, "", size + code + size, looked_up, types
        types = {"x": x, "y": x, "packed": packed, "boundaries": computed, "parameters": computed, "flag": computed}
        for name in ACTIVATIONS if b == 3 else ():
            constants = {**coded, "NAME": name, "FOLDED": name in EVEN}
            yield _triton_fused._forward, name, size + size + code, constants, types

    for nan in (False, True):
        variant, types = "with NaN" if nan else "", {**bit, "x": x, "limits": computed}
        constants = {"OPEN_LOW": True, "OPEN_HIGH": True, "NAN": nan}
        yield _triton._encode_between, variant, size + 1 / 8, constants, types
    yield _triton._decode, "of int8", 1 / 8 + size, {"BITS": 1, "IN_ROW": 8}, {**bit, "values": "*i8", "out": x}
    if size == 2:
        yield _triton._encode_lookup, "", size + 1 / 8, {"BITS": 1}, {**bit, "x": "*i16", "table": "*u8"}
    for sides in (True, False):
        moved, which = size + sides / 8 + size, "with sides" if sides else ""
        types = {**bit, "output": "*i16" if dtype == "bf16" else x, "table": as_bits, "out": as_bits}
        yield _triton._decode_beside, which, moved, {"SIDES": sides}, types
        types |= {"grad": x, "table": computed, "out": x}
        yield _triton._multiply_beside, which, size + moved, {"SIDES": sides}, types

    for name in ACTIVATIONS:
        for lie in ("", ", halves", ", short halves") if name == "silu" else ("",):  # the same for each
            constants = {"NAME": name, "HALVES": bool(lie), "LONG": lie == ", halves"}
            types = {"gate": x, "up": x, "out": x, "parameters": computed, "row": "i32"}
            yield _triton_gated._gated_forward, name + lie, 3 * size, constants, types
            del types["out"]
            types |= {"grad": x, "d_gate": x, "d_up": x}
            yield _triton_gated._gated_backward, name + lie, 5 * size, constants, types


def _pointer(bits: int) -> str:
    unit = _triton.UNITS.get(bits)
    return "*u8" if unit is None else f"*u{8 * unit.itemsize}"


def compile_for(build: Build, arch: int) -> Any:
    """What Triton makes of it for a GPU of this compute capability, where 16 divides pointers and n."""
    names = build.kernel.arg_names
    constants = {**build.constants, "GROUPS": _triton.GROUPS}
    aligned = [name for name, kind in build.types.items() if kind[0] == "*" or name == "n"]
    source = ASTSource(
        build.kernel,
        {name: build.types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": WARPS})


def count(build: Build, arch: int) -> Row:
    """What the kernel asks for, on a GPU of this compute capability."""
    compiled = compile_for(build, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    # a line is: /*address*/ @predicate INSTRUCTION.of.a.kind operands ;
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", code, re.MULTILINE)
    elements = 8 * _triton.GROUPS / (32 * WARPS)
    of_an_element = sum(name != "NOP" for name in instructions) / elements
    return Row(
        build.name, build.dtype, build.variant, build.constants.get("BITS", 0),
        round(of_an_element, 1), build.bytes, round(of_an_element / build.bytes, 1),
        compiled.metadata.shared, _number("REG", usage), _number("STACK", usage) + _number("LOCAL", usage),
    )  # fmt: skip


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _number(name: str, usage: str) -> int:
    found = re.search(rf"{name}:(\d+)", usage)
    assert found is not None, usage
    return int(found.group(1))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="only these")
    parser.add_argument("--quick", action="store_true", help="bfloat16 and 3 bits alone")
    parser.add_argument("--arch", type=int, default=90, help="compute capability: 90 is Hopper, 80 Ampere")
    parser.add_argument("--csv", type=Path, help="write the table there")
    options = parser.parse_args(arguments)
    table = []
    print(f"{'kernel':18}{'dtype':6}{'variant':24}{'bits':>4}" + "".join(f"{c:>14}" for c in Row._fields[4:]))
    for build in builds(["bf16"] if options.quick else BYTES, [3] if options.quick else range(1, 9)):
        if options.kernels and build.name not in options.kernels:
            continue
        row = count(build, options.arch)
        table.append(row)
        print(f"{row.kernel:18}{row.dtype:6}{row.variant:24}{row.bits or '':>4}" + "".join(f"{v:14}" for v in row[4:]))
    if options.csv:
        known = {"arch": options.arch, "versions": versions(["triton"])}
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*Row._fields, *known))
            writer.writerows((*row, *known.values()) for row in table)


if __name__ == "__main__":
    main()
