"""Recognition of the calls that matter under `recompute=True`: what they make, or would save.

    norm        anchors its input; what it returns has a recipe. Where the native node is none (an RMSNorm that is
                decomposed, a norm whose input autocast casts) it is run again
    softmax     anchors its output
    cast        what it returns has a recipe
    product     saves both factors, by recipe where they have one; what it returns has a recipe
    consumer    saves its operands, by recipe where they have one: Linear, matmul, convolution
    exposure    gives away the memory of a tensor, or changes it uncounted, so that nothing is known of it any more

See NOTE [ Recipes ] in `_recipes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._calls import _callables


@dataclass(frozen=True)
class RecomputeCall:
    """A callable that makes a tensor which can be computed again, or would save one.

    Attributes:
        name: as reports name it.
        kind: "norm", "softmax", "cast", "product", "consumer" or "exposure".
    """

    name: str
    kind: str


_CALLS = {
    ("layer_norm", "norm"): "F.layer_norm torch.layer_norm",
    ("rms_norm", "norm"): "F.rms_norm torch.rms_norm",
    ("group_norm", "norm"): "F.group_norm torch.group_norm",
    ("softmax", "softmax"): "F.softmax torch.softmax Tensor.softmax",
    ("to", "cast"): "Tensor.to Tensor.float Tensor.half Tensor.bfloat16 Tensor.double Tensor.type Tensor.type_as",
    ("mul", "product"): "torch.mul torch.multiply Tensor.mul Tensor.multiply Tensor.__mul__ Tensor.__rmul__ "
    "torch.ops.aten.mul",
    ("linear", "consumer"): "F.linear torch.ops.aten.linear",
    ("matmul", "consumer"): "torch.matmul Tensor.matmul Tensor.__matmul__ torch.mm Tensor.mm torch.bmm Tensor.bmm "
    "torch.ops.aten.matmul torch.ops.aten.mm torch.ops.aten.bmm",
    ("addmm", "consumer"): "torch.addmm Tensor.addmm torch.baddbmm Tensor.baddbmm torch.ops.aten.addmm",
    ("conv", "consumer"): "F.conv1d F.conv2d F.conv3d F.conv_transpose1d F.conv_transpose2d F.conv_transpose3d "
    "torch.conv1d torch.conv2d torch.conv3d torch.ops.aten.convolution",
    ("memory", "exposure"): "Tensor.data.__get__ Tensor.numpy Tensor.__array__ Tensor.data_ptr Tensor.__dlpack__ "
    "Tensor.storage Tensor.apply_ Tensor.map_ torch.ops.aten.data torch.ops.aten.set_",
    # they write in place, which is not counted
    ("collective", "exposure"): (
        " all_gather all_gather_into_tensor all_gather_single all_reduce all_reduce_coalesced all_to_all "
        "all_to_all_single broadcast gather irecv recv reduce reduce_scatter reduce_scatter_single "
        "reduce_scatter_tensor scatter"
    ).replace(" ", " torch.distributed."),
    # their results lie in the same memory, with a counter of changes of their own
    ("parts", "exposure"): "torch.unsafe_chunk torch.unsafe_split torch.unsafe_split_with_sizes Tensor.unsafe_chunk "
    "Tensor.unsafe_split Tensor.unsafe_split_with_sizes torch.ops.aten.unsafe_chunk torch.ops.aten.unsafe_split "
    "torch.ops.aten.unsafe_split_with_sizes torch.ops.aten._unsafe_view",
}
RECOMPUTE: dict[Any, RecomputeCall] = {
    function: RecomputeCall(name, kind)
    for (name, kind), paths in _CALLS.items()
    for path in paths.split()
    for function in _callables(path)
}
EXPOSES = {function: True for function, call in RECOMPUTE.items() if call.kind == "exposure"}
"""Those of the last kind, which matter under every scope: an output that is relied upon may be changed unseen."""
