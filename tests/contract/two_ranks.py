"""nnU-Net's own `run_training` with ``num_gpus=2``; where there are no two GPUs, its processes run on the CPU.

Ranks are spawned: what they run is imported from here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nnunetv2.run import run_training as nnunet
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.trainers.unwrapped import unwrapped
from tests.contract.threads import threads_for_processes
from tests.ranks import SIZE, Ranks

ON_GPUS = torch.cuda.device_count() >= SIZE
DEVICE = torch.device("cuda" if ON_GPUS else "cpu")
_TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"


class EndedEarlyError(Exception):
    """A training that was told to end early."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What ranks do beside training.

    Args:
        folder: Folder in which each rank writes what it saw, as ``<rank>.pt``.
        stop_at: Epoch at whose start the training ends, with checkpoints of those before.
        kill: End it by killing the first rank.
    """

    folder: Path
    stop_at: int | None = None
    kill: bool = False


def train(name: str, *, orders: Orders, ranks: Ranks | None, num_gpus: int = SIZE, **options: Any) -> None:
    """Call nnU-Net's `run_training`.

    Args:
        name: Name of the trainer.
        orders: See there.
        ranks: Processes that take the place of those that `torch.multiprocessing.spawn` would start for each training;
            None: `spawn` starts them.
        num_gpus: Ranks; one trains in this process.
        options: More arguments of `run_training`, of which ``dataset``, ``configuration`` and ``fold`` are needed.
    """

    def spawn(run_ddp: Callable[..., None], args: tuple[Any, ...], nprocs: int, join: bool) -> None:
        assert (run_ddp, nprocs, join) == (nnunet.run_ddp, SIZE, True)
        if ranks is None:
            mp.spawn(run_alone, (orders, name, args), nprocs, join)
        else:
            address = {key: os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT")}
            ranks.run(run_in_turn, orders, name, args, address)

    arguments = (*(options.pop(key) for key in ("dataset", "configuration", "fold")), name)
    device = torch.device("cuda") if num_gpus > 1 else DEVICE  # nnU-Net refuses another one, where it isn't used
    with patch.dict(os.environ), patch.object(nnunet, "mp", SimpleNamespace(spawn=spawn)), ExitStack() as stack:
        if num_gpus == 1:
            stack.enter_context(changed(0, orders, name, in_group=False))
        try:
            nnunet.run_training(*arguments, num_gpus=num_gpus, device=device, **options)
        except EndedEarlyError:
            assert num_gpus == 1


def run_alone(rank: int, orders: Orders, name: str, arguments: tuple[Any, ...]) -> None:
    """What a process does that `spawn` starts."""
    torch.set_num_threads(1)
    with changed(rank, orders, name):
        nnunet.run_ddp(rank, *arguments)


def run_in_turn(rank: int, orders: Orders, name: str, arguments: tuple[Any, ...], address: dict[str, str]) -> None:
    """What one of `Ranks` does: the same, with threads for nnU-Net's own pools, whose processes take long to start."""
    os.environ.update(address)
    plot = "nnunetv2.training.logging.nnunet_logger.MetaLogger.plot_progress_png"
    with threads_for_processes(), patch(plot), changed(rank, orders, name):
        try:
            nnunet.run_ddp(rank, *arguments)
        except EndedEarlyError:
            nnunet.cleanup_ddp()
    assert not dist.is_initialized()


@contextmanager
def changed(rank: int, orders: Orders, name: str, in_group: bool = True) -> Iterator[None]:
    """Watch the training of this process, and take the CPU for a GPU where it must."""
    make = nnunet.get_trainer_from_args

    def get_trainer_from_args(*arguments: Any, **options: Any) -> Any:
        trainer = make(*arguments, **options)
        if in_group and not ON_GPUS:
            trainer.device = DEVICE
        watch(trainer, rank, orders)
        return trainer

    with ExitStack() as stack:
        stack.enter_context(small(name))
        stack.enter_context(patch.object(nnunet, "get_trainer_from_args", get_trainer_from_args))
        stack.enter_context(patch.dict(os.environ, nnUNet_n_proc_DA="0"))
        if in_group and not ON_GPUS:
            for change in on_cpu():
                stack.enter_context(change)
        yield


@contextmanager
def small(name: str) -> Iterator[None]:
    """Make networks small that take their sizes from the trainer."""
    trainer = trainer_class(name)
    with ExitStack() as stack:
        for attribute in ("decoder_width", "decoder_depth"):
            if hasattr(trainer, attribute):
                stack.enter_context(patch.object(trainer, attribute, 4))
        yield


def on_cpu() -> Iterator[Any]:
    """All that nnU-Net and PyTorch have for several GPUs only."""
    join = dist.init_process_group
    yield patch.object(dist, "init_process_group", lambda backend, **options: join("gloo", **options))
    yield patch.object(torch.cuda, "set_device", lambda device: None)
    yield patch(f"{_TRAINER}.GradScaler", lambda device: None)
    yield patch(f"{_TRAINER}.DDP", lambda network, device_ids: DistributedDataParallel(network))
    yield patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda self, network: None)
    yield patch.object(nn.SyncBatchNorm, "forward", synchronised)


def synchronised(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """Batch norm over the samples of all ranks; PyTorch's own needs a GPU."""
    if not self.training:
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
    axes, shape = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
    y = x.double()
    sums = _Sum.apply(torch.stack((torch.ones_like(y).sum(axes), y.sum(axes), y.square().sum(axes))))
    n, mean, square = sums[0], sums[1] / sums[0], sums[2] / sums[0]
    variance = square - mean**2
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.float(), self.momentum)
        self.running_var.lerp_((variance * n / (n - 1)).float(), self.momentum)
    y = (y - mean.view(shape)) * (variance.view(shape) + self.eps).rsqrt()
    return y.to(x.dtype) * self.weight.view(shape) + self.bias.view(shape)


class _Sum(torch.autograd.Function):
    """Sum over ranks; each rank's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def watch(trainer: Any, rank: int, orders: Orders) -> None:
    """Write down the first step of a training and its last weights; end it where ordered."""
    seen: dict[str, Any] = {}
    start, end = trainer.on_epoch_start, trainer.on_train_end

    def train_step(batch: dict[str, Any]) -> dict[str, Any]:
        del trainer.train_step  # all further steps are its own
        seen.update(epoch=trainer.current_epoch, batch=batch, start=state(trainer.network))
        result = unclipped(trainer, batch, seed=rank)
        seen["gradients"] = gradients(trainer.network)
        return result

    def on_epoch_start() -> None:
        if trainer.current_epoch == orders.stop_at:
            torch.save(seen, orders.folder / f"{rank}.pt")
            if not orders.kill:
                raise EndedEarlyError
            if rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        start()

    def on_train_end() -> None:
        torch.save({**seen, "end": state(trainer.network)}, orders.folder / f"{rank}.pt")
        end()

    trainer.train_step, trainer.on_epoch_start, trainer.on_train_end = train_step, on_epoch_start, on_train_end


def unclipped(trainer: Any, batch: dict[str, Any], seed: int) -> dict[str, Any]:
    """A step of training whose gradients keep their norm."""
    torch.manual_seed(seed)
    if trainer.grad_scaler is not None:
        trainer.grad_scaler = torch.amp.GradScaler("cuda", init_scale=2**8)  # nnU-Net's overflows in a first step
    with patch("torch.nn.utils.clip_grad_norm_", lambda *arguments: None):
        result: dict[str, Any] = trainer.train_step(batch)
    return result


def state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {key: value.detach().clone().cpu() for key, value in unwrapped(network).state_dict().items()}


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the gradients of all parameters that have one."""
    named = unwrapped(network).named_parameters()
    return {name: p.grad.detach().clone().cpu() for name, p in named if p.grad is not None}
