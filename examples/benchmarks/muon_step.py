"""Optimizer steps of DistributedMuon, DeepSpeed's Muon and a replicated torch.optim.Muon on the same model.

The orthogonalization by itself: examples/benchmarks/newton_schulz.py.

    deepspeed --num_gpus 2 examples/benchmarks/muon_step.py                 # data parallel 2
    deepspeed --num_gpus 2 examples/benchmarks/muon_step.py --tensor 2      # tensor parallel 2
    deepspeed --num_gpus 4 examples/benchmarks/muon_step.py --tensor 2      # both

All optimizers step in turn in the same processes, so that they run under the same conditions. A step is all that
happens after the backward pass: the reduction of gradients (DeepSpeed's Muon orthogonalizes within it) and the update.
Times are those of the slowest rank, as medians over the steps after the first step and the warm-up; ratios are medians
of the ratios of steps of one round. The first step, which has empty compile caches, is reported separately. FLOPs and
bytes are counted in one more step, in which compiled functions run uncompiled. A rank's bytes sent are those of a ring:
(n - 1) / n of the buffer for a gather or scatter, and twice as many for an all-reduce.

The share of an optimizer step in a training step of half a million tokens is calculated from the median and a measured
forward and backward pass of one sequence (--seq). Each data-parallel rank has its part of the tokens.

In bf16, ours and DeepSpeed's Muon have fp32 masters, and sum gradients over ranks in fp32. `torch.optim.Muon` as it is
has neither: it sums bf16 gradients, keeps bf16 momentum and adds its updates to bf16 weights, which lose what is
smaller than their rounding. It is measured as the least that a step can do, and beside it `torch.optim.Muon, fp32`,
which does what ours does: it sums fp32 gradients, updates fp32 masters, and rounds these into the model. Gradients
become fp32 within the backward pass, whose time counts for no optimizer.

With --tensor 2 the other optimizers orthogonalize each tensor-parallel shard by itself. Their times are then those of
another update, which depends on the sharding. DeepSpeed's and torch's Muon take Q, K and V as one matrix, and gate and
up as one. Ours takes each by itself. DeepSpeed's Muon refuses bf16 with tensor parallelism at ZeRO 1, and is left out
there.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import inspect
import io
import os
import shutil
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="muon_step_")  # an empty compile cache

import torch
from newton_schulz import add_sizes
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from turns import synchronize

from megamult.parameters.stated import spec_of

atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

NAMES = ["megamult", "DeepSpeed gram", "DeepSpeed standard", "torch.optim.Muon", "torch.optim.Muon, fp32"]
VOCAB = 4096
TOKENS = 1 << 19  # tokens of the training step with which an optimizer step is compared
SENT = [0.0]  # bytes that this rank sent, counted by the wrappers below


def count_collectives() -> None:
    """Make torch.distributed's functions count the bytes that they send. Call this before other modules import them."""

    def size(tensor: torch.Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def all_to_all(n: int, given: dict[str, Any]) -> float:
        sizes, sent = given.get("input_split_sizes"), given["input"]
        own = sizes[torch.distributed.get_rank(given.get("group"))] if sizes else sent.numel() // n
        return (sent.numel() - own) * sent.element_size()

    sent: dict[str, Callable[[int, dict[str, Any]], float]] = {
        "reduce": lambda n, given: size(given["tensor"]) * (n - 1) / n,
        "all_reduce": lambda n, given: 2 * size(given["tensor"]) * (n - 1) / n,
        "broadcast": lambda n, given: size(given["tensor"]) * (n - 1) / n,
        "all_gather": lambda n, given: size(given["tensor"]) * (n - 1),
        "all_gather_into_tensor": lambda n, given: size(given["input_tensor"]) * (n - 1),
        "reduce_scatter_tensor": lambda n, given: size(given["input"]) * (n - 1) / n,
        "all_to_all_single": all_to_all,
        "isend": lambda n, given: size(given["tensor"]),
    }
    for name, rule in sent.items():
        setattr(torch.distributed, name, _counting(getattr(torch.distributed, name), rule))


def _counting(original: Callable[..., Any], rule: Callable[[int, dict[str, Any]], float]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        SENT[0] += rule(torch.distributed.get_world_size(given.get("group")), given)
        return original(*args, **kwargs)

    return call


def bf16_is_fast() -> bool:
    """Return whether this device multiplies in bf16 at least as fast as in fp32; some CPUs only emulate bf16."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 256, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda x=x: x @ x, number=1, repeat=3))
    return seconds[torch.bfloat16] <= seconds[torch.float32]


def peers_in_fp32() -> None:
    """Make the other optimizers compute Newton-Schulz in fp32 instead of bf16, which some CPUs only emulate."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_bf16_supported = lambda: False  # DeepSpeed then falls back to fp32 by itself

    def newton_schulz(grad: torch.Tensor, abc: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
        x = grad.mT if grad.size(0) > grad.size(1) else grad
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            r = x @ x.mT
            x = torch.addmm(x, torch.addmm(r, r, r, beta=abc[1], alpha=abc[2]), x, beta=abc[0])
        return x.mT if grad.size(0) > grad.size(1) else x

    torch.optim._muon._zeropower_via_newtonschulz = newton_schulz


class Contestant:
    """One optimizer with its own copy of the model."""

    def __init__(self, arguments: argparse.Namespace, name: str) -> None:
        import deepspeed

        from megamult.distributed import device
        from megamult.distributed.mesh import current_mesh
        from megamult.optim.muon.rule import Muon
        from megamult.train.deepspeed_config import deepspeed_config
        from megamult.train.deepspeed_engine import build_optimizer
        from megamult.train.model import build_model
        from megamult.zero.attach import attach

        self.name = name
        config = run_config(arguments)
        self.model = build_model(config, VOCAB, seed=1).to(device.local_device())
        mesh = current_mesh()
        settings = deepspeed_config(config, mesh.size_of("data"))
        self.ours: Muon | None = None
        if name.startswith("torch.optim.Muon"):
            self._plain(config, masters=name.endswith("fp32"))
            return
        if name == "megamult":
            optimizer = build_optimizer(config, self.model, mesh)
            rule = optimizer.rule_of("matrix")
            assert isinstance(rule, Muon)
            self.ours = rule
            with optimizer.paused(), quiet():
                self.engine, *_ = deepspeed.initialize(
                    model=self.model, optimizer=optimizer, config=settings, mpu=mesh.mpu, dist_init_required=False
                )
            attach(self.engine, optimizer)
            self.states = [optimizer.state]
        else:
            for parameter in self.model.parameters():
                parameter.use_muon = spec_of(parameter).kind == "matrix"  # type: ignore[attr-defined]
            # With reduce_scatter, DeepSpeed's Muon refuses to run at ZeRO 3.
            settings["zero_optimization"]["reduce_scatter"] = arguments.zero_stage != 3
            settings["optimizer"] = {
                "type": "muon",
                "params": {
                    "lr": config.optimizer.lr,
                    "momentum": config.optimizer.muon.momentum,
                    "weight_decay": config.optimizer.weight_decay,
                    "ns_method": name.split()[1],
                },
            }
            with quiet():
                self.engine, *_ = deepspeed.initialize(
                    model=self.model,
                    model_parameters=[p for p in self.model.parameters() if p.requires_grad],
                    config=settings,
                    mpu=mesh.mpu if arguments.tensor > 1 else None,  # with mpu, DeepSpeed's Muon refuses bf16 at ZeRO 1
                    dist_init_required=False,
                )
            self.states = [self.engine.optimizer.optimizer.state]
        self._backward, self._step = self.engine.backward, self.engine.step
        # DeepSpeed reduces gradients at the end of its function `backward`.
        self.engine.allreduce_gradients = self._measured(self.engine.allreduce_gradients)

    def _plain(self, config: Any, masters: bool) -> None:
        """Set up optimizers that update everything on every data-parallel rank after gradients are averaged.

        Args:
            config: configuration of the run.
            masters: whether fp32 copies of the parameters are updated, by fp32 gradients, instead of the parameters.
        """
        from megamult.distributed.mesh import current_mesh

        model = list(self.model.parameters())
        updated = [torch.nn.Parameter(p.detach().float()) for p in model] if masters else model
        pairs = list(zip(model, updated, strict=True))
        matrices = [q for p, q in pairs if spec_of(p).kind == "matrix"]
        others = [q for p, q in pairs if spec_of(p).kind != "matrix"]
        chosen = config.optimizer
        muon = torch.optim.Muon(
            matrices, lr=chosen.lr, weight_decay=chosen.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(others, lr=chosen.lr, weight_decay=chosen.weight_decay, fused=True)
        self.engine, self.states = self.model, [muon.state, adamw.state]
        group = current_mesh().groups["data"]

        def backward(objective: torch.Tensor) -> None:
            objective.backward()
            if masters:
                for parameter, master in pairs:
                    master.grad, parameter.grad = parameter.grad.float(), None

        def step() -> None:
            if group.size() > 1:
                for parameter in updated:
                    torch.distributed.all_reduce(parameter.grad, group=group)
                    parameter.grad /= group.size()
            torch.nn.utils.clip_grad_norm_(updated, chosen.clip_grad_norm)
            muon.step()
            adamw.step()
            for parameter in updated:
                parameter.grad = None
            if masters:
                with torch.no_grad():
                    torch._foreach_copy_(model, updated)

        self._backward, self._step = backward, step

    def _measured(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return a function that calls `function`, and adds its seconds, FLOPs and bytes sent to this contestant's."""

        def call() -> None:
            torch.distributed.barrier()
            sent, began = SENT[0], time.perf_counter()
            with FlopCounterMode(display=False) if self.counting else contextlib.nullcontext() as counter:
                function()
            synchronize()
            self.seconds += time.perf_counter() - began
            self.sent += SENT[0] - sent
            self.flops += counter.get_total_flops() if counter is not None else 0

        return call

    def run(self, tokens: torch.Tensor, labels: torch.Tensor, counting: bool = False) -> float:
        """Take one training step; return the seconds of its optimizer step on the slowest rank."""
        self.seconds, self.sent, self.flops, self.counting = 0.0, 0.0, 0, counting
        with torch.compiler.set_stance("force_eager" if counting else "default"):
            objective, _ = self.engine(tokens, labels)
            self._backward(objective)
            self._measured(self._step)()
        return all_ranks(self.seconds).max().item()

    def state_bytes(self) -> int:
        """Return the bytes of the optimizer's state on this rank."""
        tensors = [value for state in self.states for values in state.values() for value in values.values()]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def pass_seconds(arguments: argparse.Namespace) -> float:
    """Return the seconds of a forward and backward pass over one sequence on the slowest rank.

    The fastest of a few passes counts, because optimizer steps are compared with it.
    """
    from megamult.distributed import device
    from megamult.train.model import build_model

    here = device.local_device()
    model = build_model(run_config(arguments, arguments.seq), VOCAB, seed=1).to(here)
    if arguments.dtype == "bf16":
        model = model.bfloat16()
    tokens = torch.randint(0, VOCAB, (1, arguments.seq), generator=torch.Generator().manual_seed(1)).to(here)
    taken = []
    for _ in range(4):
        torch.distributed.barrier()
        synchronize()
        began = time.perf_counter()
        objective, _ = model(tokens, tokens)
        objective.backward()
        synchronize()
        taken.append(all_ranks(time.perf_counter() - began).max().item())
        model.zero_grad(set_to_none=False)
    return min(taken)


def run_config(arguments: argparse.Namespace, seq_length: int = 64) -> Any:
    """Return the configuration of a run with the benchmark's sizes, without multipliers."""
    from megamult.config import Config
    from megamult.distributed.config import ParallelConfig
    from megamult.models.llama.config import ModelConfig
    from megamult.multipliers.config import MultipliersConfig
    from megamult.optim.config import MuonConfig, OptimizerConfig
    from megamult.train.config import TrainConfig

    world = int(os.environ.get("WORLD_SIZE", "1"))
    return Config(
        model=ModelConfig(
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=arguments.hidden // 64,
            num_query_groups=arguments.groups,
            ffn_hidden_size=arguments.ffn,
            seq_length=seq_length,
        ),
        multipliers=MultipliersConfig(implementation="none"),
        optimizer=OptimizerConfig(
            name="muon", lr=1e-3, muon=MuonConfig(ns_dtype=arguments.ns_dtype, ns_form=arguments.ns_form)
        ),
        parallel=ParallelConfig(tensor=arguments.tensor, zero_stage=arguments.zero_stage),
        train=TrainConfig(
            global_batch_size=world // arguments.tensor, micro_batch_size=1, dtype=arguments.dtype, steps=1000
        ),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress DeepSpeed's warnings and what it prints."""
    import logging

    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def all_ranks(value: float) -> torch.Tensor:
    """Gather a number from every rank, [ranks]."""
    from megamult.distributed import device

    mine = torch.tensor([value], dtype=torch.float64, device=device.local_device())
    gathered = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, mine)
    return torch.cat(gathered).cpu()


def compare(arguments: argparse.Namespace) -> None:
    """Print the table of whole optimizer steps, and their shares of a training step."""
    count_collectives()
    from megamult.distributed import start

    start.initialize(arguments.tensor)
    median = measure_steps(arguments)
    gc.collect()  # frees the contestants, whose memory the next passes need
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print_shares(arguments, median)
    start.destroy()


def print_shares(arguments: argparse.Namespace, median: dict[str, float]) -> None:
    """Print the share of a training step that each optimizer step takes. `median` has its seconds by optimizer."""
    from megamult.distributed.mesh import current_mesh

    one = pass_seconds(arguments)
    if torch.distributed.get_rank() == 0:
        passes = one * TOKENS / arguments.seq / current_mesh().groups["data"].size()
        shares = ", ".join(f"{100 * step / (step + passes):.4f} % ({name})" for name, step in median.items())
        print(
            f"of a training step of {TOKENS:,} tokens, in sequences of {arguments.seq}, forward and backward "
            f"{one:.4f} s each, {passes:.2f} s for a rank's part: {shares}"
        )


def takes_part(name: str, arguments: argparse.Namespace) -> bool:
    """Return whether an optimizer can run with these arguments, and differs from the others then."""
    if name == "torch.optim.Muon, fp32":
        return arguments.dtype == "bf16"
    refused = arguments.dtype == "bf16" and arguments.tensor > 1 and arguments.zero_stage == 1
    return not (name.startswith("DeepSpeed") and refused)


def measure_steps(arguments: argparse.Namespace) -> dict[str, float]:
    """Print the table of whole optimizer steps; return their median seconds by optimizer."""
    from megamult.distributed import device
    from megamult.distributed.mesh import current_mesh

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // torch.distributed.get_world_size()))
    peers_dtype = arguments.peers_dtype or ("bf16" if bf16_is_fast() else "fp32")
    if peers_dtype == "fp32":
        peers_in_fp32()
    main_rank = torch.distributed.get_rank() == 0
    names = [name for name in arguments.only if takes_part(name, arguments)]
    text = torch.randint(0, VOCAB, (1, 65), generator=torch.Generator().manual_seed(current_mesh().rank_on("data")))
    tokens, labels = (part.contiguous().to(device.local_device()) for part in (text[:, :-1], text[:, 1:]))
    contestants = [Contestant(arguments, name) for name in names]
    first = {contestant.name: contestant.run(tokens, labels) for contestant in contestants}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for step in tqdm(range(arguments.warmup + arguments.steps), disable=not main_rank, unit="round"):
        for contestant in contestants[:: 1 if step % 2 else -1]:  # no optimizer always goes first
            taken = contestant.run(tokens, labels)
            if step >= arguments.warmup:
                seconds[contestant.name].append(taken)
    spread = {}
    for contestant in contestants:
        contestant.run(tokens, labels, counting=True)
        figures = (contestant.flops, contestant.sent, contestant.state_bytes())
        spread[contestant.name] = [all_ranks(float(figure)) for figure in figures]
    ours = contestants[names.index("megamult")].ours
    assert ours is not None and ours.plan is not None
    exchanged = all_ranks(ours.bytes_sent / (2 + arguments.warmup + arguments.steps))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    if main_rank:
        ns_dtypes = ", ".join(sorted({str(method.dtype) for method in ours.methods.values()}))
        print(
            f"hidden {arguments.hidden}, ffn {arguments.ffn}, {arguments.layers} layers, {arguments.dtype}, "
            f"Newton-Schulz: ours {ns_dtypes}, the other optimizers' {peers_dtype}; ZeRO {arguments.zero_stage}, "
            f"data parallel {current_mesh().groups['data'].size()}, tensor parallel {arguments.tensor}, "
            f"{device.local_device().type}, {torch.get_num_threads()} thread(s) per process, "
            f"medians of {arguments.steps} steps"
        )
        print(
            f"{'':<23}{'step ms':>9}{'range':>7}{'ours/it':>9}{'first s':>9}{'GFLOP mean':>12}{'busiest':>9}"
            f"{'sent MB':>9}{'busiest':>9}{'state MB':>10}"
        )
        for name in names:
            flop, sent, state = spread[name]
            width = (max(seconds[name]) - min(seconds[name])) / median[name]
            pairs = zip(seconds["megamult"], seconds[name], strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            print(
                f"{name:<23}{1e3 * median[name]:>9.1f}{width:>7.2f}{ratio:>9.3f}"
                f"{first[name]:>9.2f}{flop.mean() / 1e9:>12.2f}{flop.max() / 1e9:>9.2f}{sent.mean() / 1e6:>9.2f}"
                f"{sent.max() / 1e6:>9.2f}{state.mean() / 1e6:>10.2f}"
            )
        matrices = sum(matrix.numel for matrix in ours.plan.matrices)
        itemsize = torch.empty((), dtype=ours.exchange_dtype).element_size()
        share = itemsize * matrices / ours.plan.ranks
        print(
            f"exchanges of ours: {exchanged.mean() / 1e6:.2f} MB sent per rank and step, busiest "
            f"{exchanged.max() / 1e6:.2f}; in units of itemsize x matrix elements / ranks: "
            f"{exchanged.mean() / share:.3f} and {exchanged.max() / share:.3f}"
        )
        if arguments.tensor > 1:
            print("tensor parallel: DeepSpeed's and torch's update is not that of one process; ours is")
    return median


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = add_sizes(parser)
    parser.add_argument("--seq", type=int, default=2048 if cuda else 512, help="tokens of the sequence that is timed")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--zero_stage", type=int, default=1, choices=(1, 2, 3), help="ZeRO stage")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="bf16" if cuda else "fp32", help="dtype of the model"
    )
    parser.add_argument(
        "--ns_dtype",
        choices=("fp32", "bf16", "fp16"),
        default="bf16" if cuda else "fp32",
        help="dtype of DistributedMuon's Newton-Schulz",
    )
    parser.add_argument(
        "--ns_form",
        choices=("auto", "standard", "gram"),
        default="auto",
        help="form of DistributedMuon's Newton-Schulz; default: the one measured to be the fastest",
    )
    parser.add_argument(
        "--peers_dtype",
        choices=("fp32", "bf16"),
        help="of Newton-Schulz's standard form in the peers; default: their bf16 unless the device is slower in it",
    )
    parser.add_argument("--steps", type=int, default=9, help="measured steps of each optimizer")
    parser.add_argument(
        "--warmup",
        type=int,
        default=1,
        help="warm-up steps of each optimizer between its first step and the measured ones",
    )
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, help="the optimizers that step")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "megamult" not in arguments.only:
        parser.error(f"--only {' '.join(arguments.only)}: megamult is missing, and ratios are to its time; add it")
    compare(arguments)


if __name__ == "__main__":
    main()
