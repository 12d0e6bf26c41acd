"""DeepSpeed's view of Megatron's process groups: the argument `mpu` of `deepspeed.initialize`."""

from __future__ import annotations

from megatron.core import parallel_state


class ModelParallelUnit:
    """Object from which DeepSpeed gets Megatron's groups. "Model parallel" in a method's name means tensor parallel."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("get_model_parallel_"):
            name = name.replace("get_model_parallel_", "get_tensor_model_parallel_")
        if not name.startswith("get_"):
            raise AttributeError(name)
        return getattr(parallel_state, name)
