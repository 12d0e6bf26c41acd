"""What each rank runs for the tests of the layers: all cases of all tensor-parallel sizes in one launch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.multipliers import cases
from tests.multipliers.cases import CASES, LayerCase


def build(case: LayerCase, plain: bool = False) -> torch.nn.Module:
    """The case's layer, or with `plain` the class of Megatron's that it extends."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    from megamult import layers
    from megamult.parameters import megatron

    config = ModelParallelConfig(
        tensor_model_parallel_size=case.tensor, sequence_parallel=case.sequence, use_cpu_initialization=True
    )
    columns = cases.COLUMNS[case.layer]
    common: dict[str, Any] = {"config": config, "init_method": torch.nn.init.normal_}
    ours: dict[str, Any] = {"placement": case.megamult_placement(), "grad_sync": case.grad_sync}
    if case.layer == "embedding":
        kind = VocabParallelEmbedding if plain else layers.MultiplierVocabParallelEmbedding
        ours["vocab_size"] = cases.VOCAB
        common["reduce_scatter_embeddings"] = case.sequence
        return kind(cases.PADDED_VOCAB, columns, **common, **({} if plain else ours))
    common |= {"bias": True, "skip_bias_add": False}
    rows = sum(cases.PARTS[case.layer].values())
    if case.layer == "row":
        kind = RowParallelLinear if plain else layers.MultiplierRowParallelLinear
        return kind(columns, rows, input_is_parallel=True, **common, **({} if plain else ours))
    kind = ColumnParallelLinear if plain else layers.MultiplierColumnParallelLinear
    if case.layer == "qkv":
        ours["spec"] = megatron.fused_qkv(cases.HEADS, cases.GROUPS, cases.HEAD_DIM, columns)
    elif case.layer == "gate_up":
        ours["spec"] = megatron.fused_gate_up(cases.FFN, columns)
    return kind(columns, rows, gather_output=False, **common, **({} if plain else ours))


def load(layer: torch.nn.Module, values: dict[str, Tensor]) -> None:
    """Set a layer's parameters. Raises if names or shapes differ."""
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == values.keys(), (parameters.keys(), values.keys())
    with torch.no_grad():
        for name, value in values.items():
            assert parameters[name].shape == value.shape, (name, parameters[name].shape, value.shape)
            parameters[name].copy_(value)


def forward_backward(case: LayerCase, rank: int, layer: torch.nn.Module) -> dict[str, Tensor]:
    """The rank's output `y`, input gradient `dx`, and the gradient of every parameter by name."""
    data = cases.draw(case)
    x = cases.local_input(case, rank, data.x).clone().requires_grad_(case.layer != "embedding")
    output = layer(x)
    output = output[0] if isinstance(output, tuple) else output
    output.backward(cases.local_output(case, rank, data.dy))
    # Clones: a view would be sent to the test with the storage of the whole.
    results = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    results["y"] = output.detach().clone()
    return results if x.grad is None else results | {"dx": x.grad.clone()}


def gradients_of(case: LayerCase, rank: int) -> dict[str, Any]:
    """Results with the case's multipliers, and what each parameter's layout says about its gradient."""
    from megamult.parameters.stated import spec_of

    layer = build(case)
    # Nothing may depend on the entries of a row multiplier that no row uses.
    load(layer, cases.shard(case, rank, cases.draw(case), unused=float("nan")))
    partial = {name: ("tensor" in spec_of(p).reduce_over) for name, p in layer.named_parameters() if name != "bias"}
    return {"results": forward_backward(case, rank, layer), "partial": partial}


def fresh_differences(case: LayerCase, rank: int) -> list[str]:
    """Which results of a fresh layer are not bitwise those of Megatron's plain one."""
    fresh, plain = build(case), build(case, plain=True)
    values = cases.shard(case, rank, cases.draw(case), unused=1.0)
    values = {name: value for name, value in values.items() if not name.endswith("_multiplier")}
    load(plain, values)
    load(fresh, values | {name: p for name, p in fresh.named_parameters() if name.endswith("_multiplier")})
    got, want = forward_backward(case, rank, fresh), forward_backward(case, rank, plain)
    return [name for name in want if not torch.equal(got[name], want[name])]


def collectives_of(case: LayerCase, rank: int) -> dict[str, list[str]]:
    """The collectives of one forward and backward pass, of our layer and of Megatron's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    found = {}
    for name, plain in (("multipliers", False), ("plain", True)):
        layer = build(case, plain)
        with Recorder() as recorder:
            forward_backward(case, rank, layer)
        found[name] = recorder.names
    return found


class _LiveStorages:
    """Sizes of the tensors that were made under the mode and are still alive."""

    def __init__(self) -> None:
        self.references: dict[int, tuple[Any, int]] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        from torch.multiprocessing.reductions import StorageWeakRef
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        references = self.references

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                for tensor in tree_leaves(result):
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        references[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                return result

        with Recorder():
            yield

    def sizes(self, known: list[Tensor]) -> list[int]:
        """Bytes of each live storage but those of the `known` tensors."""
        ours = {tensor.untyped_storage()._cdata for tensor in known}
        return sorted(n for key, (ref, n) in self.references.items() if key not in ours and not ref.expired())


def kept_for_backward(case: LayerCase, rank: int) -> dict[str, Any]:
    """Bytes of each tensor that forward leaves alive besides parameters, input and output; and of the weight."""
    from megatron.core.parallel_state import get_global_memory_buffer

    layer = build(case)
    x = cases.local_input(case, rank, cases.draw(case).x).clone().requires_grad_()
    live = _LiveStorages()
    with live.recording():
        output = layer(x)[0]
    reused = get_global_memory_buffer().buffer.values()  # Megatron's, as large as any layer ever needed
    return {
        "alive": live.sizes([x, output, *layer.parameters(), *reused]),
        "weight": layer.weight.untyped_storage().nbytes(),
    }


def sharded_state_of(case: LayerCase, rank: int) -> dict[str, Any]:
    """The multipliers' ShardedTensors after Megatron applied their factories, and what merging gives back."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

    layer = build(case)
    values = cases.shard(case, rank, cases.draw(case), unused=1.0)
    load(layer, values)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = layer.sharded_state_dict(prefix="m.", metadata=metadata)
    factories = {name: entry for name, entry in sharded.items() if name.endswith("_multiplier")}
    assert all(isinstance(entry, ShardedTensorFactory) for entry in factories.values())
    differ = []
    for name, factory in factories.items():
        pieces = [piece.data for piece in factory.build()]
        if not torch.equal(factory.merge_fn(pieces), values[name.removeprefix("m.")]):
            differ.append(name)
    built = dict(factories)
    apply_factories(built)
    pieces = [piece for entry in built.values() for piece in entry if isinstance(piece, ShardedTensor)]
    return {
        "pieces": [(p.key, p.global_shape, p.global_offset, p.data.clone(), p.replica_id) for p in pieces],
        "merge_differs": differ,
        "names": sorted(factories),
    }


FRESH = [case for case in CASES if case.placement in ("rcs", "all", "mixed", "scalar")]
COUNTED = [case for case in CASES if case.tensor == 2 and case.placement in ("rcs", "all")]
KEPT = [
    case
    for case in CASES
    if case.tensor < 4 and case.placement in ("rcs", "all", "scalar") and case.layer != "embedding"
]
SAVED = [case for case in CASES if not case.sequence and case.grad_sync == "step"]

RUNS: dict[str, tuple[Any, list[LayerCase]]] = {
    "gradients": (gradients_of, CASES),
    "fresh": (fresh_differences, FRESH),
    "collectives": (collectives_of, COUNTED),
    "kept": (kept_for_backward, KEPT),
    "sharded": (sharded_state_of, SAVED),
}


def run_all() -> dict[tuple[str, LayerCase], Any]:
    """Every run's result on this rank, by (run, case). A rank beyond a case's tensor parallel size leaves it out."""
    from megamult.distributed import start

    results = {}
    for tensor in sorted({case.tensor for case in CASES}):
        start.initialize(tensor)
        if torch.distributed.get_rank() < tensor:
            for run, (function, chosen) in RUNS.items():
                for case in chosen:
                    if case.tensor == tensor:
                        results[run, case] = function(case, torch.distributed.get_rank())
    return results
