"""What two processes do, each in the same way: its results go to test_distributed.py, which compares them."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fewbit_hooks as fewbit
from held import held_for_backward

WORLD = 2
SCOPES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "3 bits": {"bits": 3},
    "exact": {"exact": True},
    "exact, recompute": {"exact": True, "recompute": True},
}
STEPS = 4
"""A scope has learned by then, where the first step is spent on the shapes of a pipeline, too."""


def scope(name: str) -> Any:
    settings = SCOPES[name]
    if settings is None:
        return contextlib.nullcontext()
    made = fewbit.scope(min_bytes=0, **settings)
    made._warned = True
    return made


def batch(step: int) -> Tensor:
    """The whole batch; a data-parallel process takes its half."""
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(step))


class Block(nn.Module):
    """A norm, a Linear, an activation, a Linear: with the activation's output kept, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
        self.clip = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.clip(x + self.down(self.act(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.unused = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def net(unused: bool = False) -> Net:
    torch.manual_seed(0)
    made = Net()
    if not unused:
        del made.unused
    return made


def whole(t: Tensor) -> Tensor:
    """All of a DTensor."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def train(
    model: nn.Module,
    around: Any,
    data: Callable[[int], Tensor],
    accumulate: Callable[[], Any] | None = None,
    gathered: Callable[[], Any] = contextlib.nullcontext,
) -> dict[str, Any]:
    """Some steps of gradient descent: the losses, the last gradients, the bytes held in the last step.

    Args:
        gathered: in it, gradients are whole.
    """
    losses = []
    for step in range(STEPS):
        model.zero_grad()
        if accumulate is not None:
            with accumulate(), around:
                model(data(step + 100)).square().mean().backward()
        with around:
            loss = model(data(step)).square().mean()
        held = held_for_backward(loss, model.parameters(), tables=False)
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    with gathered():
        gradients = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses, "gradients": gradients, "held": sum(held.values())}


def mine(step: int) -> Tensor:
    """This process's half of the batch."""
    return batch(step).chunk(WORLD)[dist.get_rank()]


def ddp(name: str) -> dict[str, Any]:
    return train(nn.parallel.DistributedDataParallel(net()), scope(name), mine)


def ddp_find_unused_parameters(name: str) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(net(unused=True), find_unused_parameters=True)
    return train(model, scope(name), mine)


def ddp_static_graph(name: str) -> dict[str, Any]:
    return train(nn.parallel.DistributedDataParallel(net(), static_graph=True), scope(name), mine)


def ddp_no_sync(name: str) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(net())
    return train(model, scope(name), mine, accumulate=model.no_sync)


def fsdp(name: str, *, parts: bool = False, checkpointed: bool = False) -> dict[str, Any]:
    """Sharded block by block; or each norm and Linear for itself."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import fully_shard

    model = net()
    if checkpointed:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        for part in (block.norm, block.up, block.down) if parts else ():
            fully_shard(part, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, scope(name), mine)


def fsdp_parts(name: str) -> dict[str, Any]:
    return fsdp(name, parts=True)


def fsdp_checkpoint(name: str) -> dict[str, Any]:
    return fsdp(name, checkpointed=True)


def fsdp1(name: str) -> dict[str, Any]:
    """The first FSDP, of flat parameters, block by block."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy, cpu = ModuleWrapPolicy({Block}), torch.device("cpu")
    model = FullyShardedDataParallel(net(), auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    gathered = functools.partial(FullyShardedDataParallel.summon_full_params, model, with_grads=True)
    found = train(model, scope(name), mine, gathered=gathered)
    found["gradients"] = {n.replace("_fsdp_wrapped_module.", ""): g for n, g in found["gradients"].items()}
    return found


def tensor_parallel(name: str, *, local: bool = True) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    for block in model.blocks:
        plan = {"up": ColwiseParallel(use_local_output=local), "down": RowwiseParallel()}
        parallelize_module(block, init_device_mesh("cpu", (WORLD,)), plan)
    return train(model, scope(name), batch)


def tensor_parallel_dtensor(name: str) -> dict[str, Any]:
    return tensor_parallel(name, local=False)


def pipeline(name: str, *, schedule: str = "ScheduleGPipe") -> dict[str, Any]:
    """Each process has a part of the blocks; four microbatches, backward in the schedule's order."""
    from torch.distributed import pipelining

    blocks = net().blocks
    stage_module = nn.Sequential(*(blocks[:2] if dist.get_rank() == 0 else blocks[2:]))
    stage = pipelining.PipelineStage(stage_module, dist.get_rank(), WORLD, torch.device("cpu"))
    runner = getattr(pipelining, schedule)(
        stage, n_microbatches=4, loss_fn=lambda y, target: (y - target).square().mean()
    )
    around, losses, held = scope(name), [], [0]

    def look(_: nn.Module, __: Any, y: Tensor) -> None:
        # beside the output, which the schedule keeps
        held.append(sum(held_for_backward(y, [*stage_module.parameters(), y], tables=False).values()))

    stage_module.register_forward_hook(look)
    for step in range(STEPS):
        stage_module.zero_grad()
        out: list[Tensor] = []
        with around:
            if dist.get_rank() == 0:
                runner.step(batch(step))
            else:
                runner.step(target=torch.zeros(16, 32), losses=out)
        losses.append(torch.stack(out).mean().detach() if out else torch.zeros(()))
        with torch.no_grad():
            for p in stage_module.parameters():
                p -= 0.1 * p.grad
    first = 0 if dist.get_rank() == 0 else 2
    gradients = {
        f"blocks.{first + int(n.partition('.')[0])}.{n.partition('.')[2]}": p.grad.clone()
        for n, p in stage_module.named_parameters()
    }
    return {"losses": losses, "gradients": gradients, "held": held[-1]}  # of the last microbatch


def pipeline_1f1b(name: str) -> dict[str, Any]:
    return pipeline(name, schedule="Schedule1F1B")


CASES: dict[str, Callable[[str], dict[str, Any]]] = {
    case.__name__: case
    for case in (
        ddp,
        ddp_find_unused_parameters,
        ddp_static_graph,
        ddp_no_sync,
        fsdp,
        fsdp_parts,
        fsdp_checkpoint,
        fsdp1,
        tensor_parallel,
        tensor_parallel_dtensor,
        pipeline,
        pipeline_1f1b,
    )
}


def alone(name: str, *, accumulate: bool = False) -> dict[str, Any]:
    """One process with the whole batch."""
    return train(net(), scope(name), batch, contextlib.nullcontext if accumulate else None)


def process(rank: int, directory: str, cases: tuple[str, ...]) -> None:
    """One of the processes."""
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "OFF"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {}
    for case in cases:
        for name in SCOPES:
            try:
                results[case, name] = copy.deepcopy(CASES[case](name))
            except Exception:
                results[case, name] = traceback.format_exc()
    done = [Path(directory) / f"{r}.pt" for r in range(WORLD)]
    torch.save(results, done[rank].with_suffix(".part"))
    done[rank].with_suffix(".part").rename(done[rank])
    while not all(path.exists() for path in done):  # then nobody waits for anybody any more
        time.sleep(0.05)
    # gloo's threads after a fully_shard now and then abort the process as it ends (3 of 34 runs without this library)
    os._exit(0)
