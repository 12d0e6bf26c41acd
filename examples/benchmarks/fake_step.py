"""Whole training steps on fake CUDA tensors, and a watch over the operators: launches, waits, collectives, dtypes.

    import fake_step  # before torch

The operators are those of a GPU, one by one, and no CPU tensor may meet a CUDA one, as there. A tensor has no values,
so that a step of any size takes seconds. Values that the host reads are 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import fake_cuda  # before torch

# isort: split
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megamult.config import Config
from megamult.distributed import device, process_groups, start
from megamult.distributed.mesh import Mesh, current_mesh
from megamult.multipliers.layer_scaling import LayerScaling
from megamult.multipliers.scaling import bands
from megamult.optim.build import make_optimizer
from megamult.optim.muon import symmetric
from megamult.parameters.stated import names_of
from megamult.train.model import build_model
from megamult.train.votes import mean_and_votes
from megamult.zero.full_precision import FullPrecision
from megamult.zero.whole import UnfusedPartition

ROOT = Path(__file__).resolve().parents[2]
HERE = str(Path(__file__).parent)
VOCABULARY = 1000
MODE = FakeTensorMode(allow_non_fake_inputs=False)
"""One mode for all runs, because megamult keeps tables of indices by shape and device."""

aten = torch.ops.aten
COPIES = (aten._to_copy, aten.copy_, aten._foreach_copy_)
NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "alias", "detach", "detach_", "lift_fresh", "set_", "resize_"),
    *("_local_scalar_dense", "_pin_memory", "is_pinned", "is_same_size", "record_stream"),
}
"""Operators that start no kernel and are not views in the eyes of torch."""


class Watch(TorchDispatchMode):
    """Counts of what operators do on CUDA while the watch is entered.

    Attributes:
        launches: operators that start a kernel, by (operator, place). A `foreach` function counts once (it is one
            kernel for some 100 tensors), and so does a function that torch compiles. Its backward counts operator by
            operator.
        waits: waits of the host for the device, by (kind, place): a value that is read, and a copy between the two that
            is not asynchronous.
        collectives: (number, bytes of this rank's input) by kind.
        flops: FLOPs of matrix products by dtype.
        wide: FLOPs of the products that are not in half precision, by (operator, place).
        host: operators on the host's own tensors of one or more dimensions, by (operator, place).
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.collectives: dict[str, list[int]] = {}
        self.flops: Counter[str] = Counter()
        self.wide: Counter[tuple[str, str]] = Counter()
        self.host: Counter[tuple[str, str]] = Counter()
        self._inside = 0

    def __enter__(self) -> Watch:
        fake_cuda.COUNTING.append(self)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        fake_cuda.COUNTING.pop()

    @contextlib.contextmanager
    def one_launch(self) -> Iterator[None]:
        """Count all launches inside the context as one."""
        if not self._inside:
            self.launches["compiled", place()] += 1
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def read(self) -> None:
        """Count a wait for a value."""
        self.waits["read", place()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func is aten._local_scalar_dense.default and given[0].is_cuda:
            self.read()
            return True if given[0].dtype == torch.bool else 1.0 if given[0].is_floating_point() else 1
        if func.overloadpacket is aten._pin_memory:
            pinned: Tensor = given[0].clone()
            pinned.in_pinned_memory = True  # type: ignore[attr-defined]
            return pinned
        if func.namespace == "c10d":
            self._collective(name, given)
        elif func.overloadpacket in COPIES:
            self._copy(func, args, kwargs)
        elif len({each.device.type for each in given if each.dim()}) > 1:
            # torch itself raises for most operators, but copies indices on the CPU to the device, with a wait.
            where = ", ".join(f"{list(each.shape)} on {each.device}" for each in given)
            raise RuntimeError(f"{func.name()} of {place()} gets tensors of several devices: {where}")
        result = func(*args, **kwargs)
        tensors = [*given, *(each for each in tree_leaves(result) if isinstance(each, Tensor))]
        if func.is_view or name in NO_KERNEL or func.namespace in ("c10d", "prim"):
            return result
        if any(each.is_cuda for each in tensors):
            if not self._inside:
                self.launches[name, place()] += 1
            self._product(func, args, kwargs, result, given)
        elif any(each.dim() for each in tensors):
            self.host[name, place()] += 1
        return result

    def _product(self, func: Any, args: Any, kwargs: Any, result: Any, given: list[Tensor]) -> None:
        if func.overloadpacket not in flop_registry:
            return
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        dtype = next(each.dtype for each in given if each.is_floating_point())
        self.flops[str(dtype).removeprefix("torch.")] += flops
        if dtype.itemsize > 2:
            self.wide[func.overloadpacket.__name__, place()] += flops

    def _copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """Count a copy between host and device as a wait, unless it is asynchronous and to or from pinned memory."""
        asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)
        if func.overloadpacket is aten._to_copy:
            pairs = [(torch.device(kwargs.get("device") or args[0].device), None, args[0])]
        else:
            targets, sources = args[:2] if func.overloadpacket is aten._foreach_copy_ else (args[:1], args[1:2])
            pairs = [(target.device, target, source) for target, source in zip(targets, sources, strict=True)]
        for there, target, source in pairs:
            host = source if there.type == "cuda" else target
            if there.type != source.device.type and not (asynchronous and hasattr(host, "in_pinned_memory")):
                self.waits["copy to " + there.type, place()] += 1

    def _collective(self, name: str, given: list[Tensor]) -> None:
        entry = self.collectives.setdefault(name.strip("_").removesuffix("_base"), [0, 0])
        entry[0] += 1
        sent = given if name.strip("_").startswith("allreduce") else given[-1:]  # others are given outputs first
        entry[1] += sum(each.numel() * each.element_size() for each in sent)


def place() -> str:
    """Return file and function of the innermost frame outside torch and this folder, "backward" for what autograd calls
    by itself, or :data:`DEEPSPEED` for what :class:`Run` does in its place."""
    frame = sys._getframe(1)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if function == "_engine_run_backward":
            return "backward"
        if file == __file__ and function in ("micro_batch", "step"):
            return DEEPSPEED
        if not file.startswith(("<", HERE)) and not any(f"{os.sep}{each}" in file for each in _PASSED):
            path = Path(file)
            name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
            return f"{name}:{function}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


DEEPSPEED = "DeepSpeed"
_PASSED = (f"torch{os.sep}", "contextlib.py")


@contextlib.contextmanager
def fake_cuda_device() -> Iterator[FakeTensorMode]:
    """Enter a FakeTensorMode in which megamult and Megatron compute on "cuda".

    What looks into values on the host while it is made (tables of rows and columns) is made of real values first.
    """

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return MODE.from_tensor(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {each.name: fake(getattr(value, each.name)) for each in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        if isinstance(value, dict):
            return {key: fake(each) for key, each in value.items()}
        # Named tuples hold no tensors here.
        return type(value)(map(fake, value)) if type(value) in (list, tuple) else value

    made = LayerScaling.__init__

    def layer_scaling(self: LayerScaling, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():
            made(self, *args, **kwargs)
        vars(self).update(fake(vars(self)))

    def of_slices(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            found = bands(*args, **kwargs)
        return fake(found)

    def read(tensor: Tensor) -> Any:
        # One copy brings all values to the host. Without this, torch's fake tensors read them one by one.
        if tensor.is_cuda and fake_cuda.COUNTING:
            fake_cuda.COUNTING[-1].read()  # type: ignore[attr-defined]
        return _ones(tuple(tensor.shape))

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (device, "has_cuda", lambda: True),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_count", lambda: 1),
            (LayerScaling, "__init__", layer_scaling),
            (sys.modules["megamult.optim.folded"], "bands", of_slices),
            (FakeTensor, "tolist", read),
            (torch.nn.functional, "scaled_dot_product_attention", _attention),
            (torch.nn.functional, "rms_norm", _rms_norm),
            # Fake storages have no address, but layers compare the addresses of what they save.
            (FakeTensor, "data_ptr", lambda tensor: tensor.untyped_storage()._cdata + tensor.storage_offset()),
            # Objects travel as tensors with values.
            (Mesh, "gather_objects", lambda self, value: [value] * self.size),
            (Mesh, "broadcast_objects", lambda self, objects: None),
        ):
            stack.enter_context(patch.object(target, name, value, create=name == "data_ptr"))
        stack.enter_context(_kernel())
        # Backward on this thread, which is in the modes.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield stack.enter_context(MODE)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any
) -> Tensor:
    """Return the attention by the kernel that torch takes on a GPU. Without CUDA, torch would take plain products."""
    if attn_mask is not None or q.dtype.itemsize > 2:
        made = aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, True, 0.0, is_causal, scale=options.get("scale")
        )
    else:
        made = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=options.get("scale"))
    result: Tensor = made[0]
    return result


class _RMSNorm(torch.autograd.Function):
    """torch's RMSNorm as on a GPU: one kernel forward, and one backward for each gradient. Without CUDA, torch would
    take eight and more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with fake_cuda.one_launch():
            return x.clone() if weight is None else x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        with fake_cuda.one_launch():
            of_x = grad * x
        if weight is None:
            return of_x, None
        with fake_cuda.one_launch():
            return of_x, weight.clone()


def _rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    result: Tensor = _RMSNorm.apply(x, weight)
    return result


def _ones(shape: tuple[int, ...]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def _kernel() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the device has the Triton kernel, if Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return contextlib.nullcontext()
    from megamult.optim.muon.symmetric_triton import lower_tiles

    everywhere = contextlib.ExitStack()
    everywhere.enter_context(patch.object(symmetric, "lower_tiles", lower_tiles, create=True))
    everywhere.enter_context(patch("megamult.optim.muon.rule.has_kernel", lambda here: True))
    return everywhere


def initialize(tensor: int, data: int) -> Mesh:
    """Return the mesh of rank 0 of `tensor` x `data` processes, none of which is there."""
    start.destroy()
    torch.distributed.init_process_group("fake", rank=0, world_size=tensor * data, store=FakeStore())
    process_groups.create(tensor, datetime.timedelta(minutes=1))
    return current_mesh()


class Run:
    """Model and optimizer of a run at ZeRO 0 in bf16, on fake CUDA tensors.

    DeepSpeed's part is done as its FP16_UnfusedOptimizer does it, without what it reads on the host: fp32 masters, a
    copy of each gradient to fp32, and of each master back to bf16.

    Args:
        config: configuration of the run.
        mesh: mesh of the processes.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        with Watch():
            self._build()

    def _build(self) -> None:
        config, mesh = self.config, self.mesh
        self.model = build_model(config, VOCABULARY, seed=None)
        self.optimizer = make_optimizer(self.model, config.optimizer, config.multipliers, mesh=mesh)
        groups = self.optimizer.param_groups
        self._bf16 = [list(group["params"]) for group in groups]
        self._fp32 = [[p.clone().float().detach().requires_grad_() for p in group] for group in self._bf16]
        for group, masters in zip(groups, self._fp32, strict=True):
            group["params"] = masters
        made = SimpleNamespace(fp16_groups=self._bf16, fp32_groups=self._fp32)
        self.partition = UnfusedPartition(made, names_of(self.model), mesh)
        self.partition.full_precision = FullPrecision.of(self.partition)
        self.partition.stepped()
        self.optimizer.bind(self.partition)
        shape = (config.train.micro_batch_size, config.model.seq_length)
        self._samples = torch.zeros(2, *shape, dtype=torch.long)

    def micro_batch(self) -> None:
        """Bring the tokens of a micro-batch to the device, and run forward and backward."""
        tokens, labels = device.upload(self._samples)
        objective, entropy = self.model(tokens, labels)
        objective.backward()
        self._loss = entropy.float()

    def step(self) -> None:
        """Take the optimizer step, and do what the training loop does after it."""
        pairs = [pair for groups in zip(self._bf16, self._fp32, strict=True) for pair in zip(*groups, strict=True)]
        self.optimizer.prepare(self.partition)
        for parameter, master in pairs:
            master.grad = parameter.grad.float()
        self.optimizer.step()
        self.optimizer.finish()
        for parameter, master in pairs:
            master.grad = parameter.grad = None
            parameter.data.copy_(master.data)
        self.partition.stepped()
        mean_and_votes(self.mesh, self._loss, (0.0, 0.0))


def counts(config: Config, mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Return what a micro-batch and the optimizer step after it do, by "micro_batch" and "step".

    Steps before are not counted, because the first ones make tables and state. Launches leave out those of this file,
    which stand for DeepSpeed's.
    """
    found = {}
    with fake_cuda_device():
        run = Run(config, mesh)
        with Watch():
            run.micro_batch()
            run.step()
        for name, do in (("micro_batch", run.micro_batch), ("step", run.step)):
            with Watch() as watch:
                do()
            where = {key: number for key, number in watch.launches.items() if key[1] != DEEPSPEED}
            found[name] = {
                "launches": sum(where.values()),
                "waits": {" ".join(key): number for key, number in watch.waits.items()},
                "collectives": watch.collectives,
                "flops": watch.flops,
                "wide": {" ".join(key): number for key, number in watch.wide.items()},
                "host": {" ".join(key): number for key, number in watch.host.items()},
                "where": {" ".join(key): n for key, n in sorted(where.items(), key=lambda each: -each[1])},
            }
    return found
