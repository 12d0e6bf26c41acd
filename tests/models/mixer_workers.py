"""What each rank runs for the tests of the mixer, and a plain reference of the whole mixer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megamult.models.common.mamba2.sizes import MixerSizes
from megamult.models.common.ssd import recurrence

HIDDEN, SEQ, BATCH = 12, 10, 2
SIZES = {
    "one group": MixerSizes(heads=4, head_dim=3, state=5, groups=1, chunk=4),
    "two groups, norm before gate": MixerSizes(4, 3, 5, groups=2, chunk=4, norm="before_gate"),
    "one group, norm after gate": MixerSizes(4, 3, 5, groups=1, kernel=3, chunk=16, norm="after_gate"),
    "four groups, no bias": MixerSizes(8, 2, 3, groups=4, chunk=4, conv_bias=False),
}
EPS = 1e-5


def whole(name: str) -> dict[str, Tensor]:
    """Random whole parameters in float64, by the names of the mixer's parameters."""
    sizes, generator = SIZES[name], torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    channels = sizes.inner + 2 * sizes.shared
    found = {
        "in_proj.weight": normal(sum(sizes.rows), HIDDEN) / 3,
        "conv_weight": normal(channels, 1, sizes.kernel) / 2,
        "dt_bias": normal(sizes.heads),
        "A_log": normal(sizes.heads),
        "D": normal(sizes.heads),
        "out_proj.weight": normal(HIDDEN, sizes.inner) / 3,
    }
    if sizes.conv_bias:
        found["conv_bias"] = normal(channels)
    if sizes.norm != "none":
        found["norm_weight"] = normal(sizes.inner)
    return found


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [seq, batch, hidden], documents [batch, seq], and weights of the output in the objective."""
    generator = torch.Generator().manual_seed(5)
    hidden, weights = (torch.randn(SEQ, BATCH, HIDDEN, dtype=torch.float64, generator=generator) for _ in range(2))
    documents = torch.tensor([[0] * 4 + [1] * 1 + [2] * 5, [0] * 10])
    return hidden, documents, weights


def reference(name: str, values: dict[str, Tensor], hidden: Tensor, documents: Tensor | None) -> Tensor:
    """The mixer by its formulas, token by token where tokens act on each other."""
    sizes = SIZES[name]
    u = hidden.transpose(0, 1)
    z, x, b, c, dt = (u @ values["in_proj.weight"].T).split(list(sizes.rows), -1)
    channels, weight = torch.cat([x, b, c], -1), values["conv_weight"][:, 0]
    convolved = torch.zeros_like(channels) + values.get("conv_bias", torch.zeros(()))
    for batch in range(BATCH):
        for t in range(SEQ):
            for j in range(min(sizes.kernel, t + 1)):
                if documents is None or documents[batch, t] == documents[batch, t - j]:
                    added = torch.zeros_like(channels)
                    added[batch, t] = 1
                    convolved = convolved + added * (weight[:, -1 - j] * channels[batch, t - j])
    x, b, c = F.silu(convolved).split([sizes.inner, sizes.shared, sizes.shared], -1)
    y, _ = recurrence(
        x.unflatten(-1, (sizes.heads, -1)),
        F.softplus(dt + values["dt_bias"]),
        -values["A_log"].exp(),
        b.unflatten(-1, (sizes.groups, -1)),
        c.unflatten(-1, (sizes.groups, -1)),
        values["D"],
        documents=documents,
    )
    y = y.flatten(-2)

    def normed(each: Tensor) -> Tensor:
        grouped = each.unflatten(-1, (sizes.groups, -1))
        return (grouped / (grouped.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2) * values["norm_weight"]

    gate = F.silu(z)
    y = {"none": lambda: y * gate, "before_gate": lambda: normed(y) * gate, "after_gate": lambda: normed(y * gate)}[
        sizes.norm
    ]()
    return (y @ values["out_proj.weight"].T).transpose(0, 1)


def mixers(tensor: int, sequence: bool) -> dict[str, dict[bool, dict[str, Any]]]:
    """Output, gradient of the input, and each parameter's gradient, for each of SIZES, without and with documents."""
    from megatron.core.transformer import TransformerConfig

    from megamult.distributed import start
    from megamult.models.common.mamba2.mixer import Mixer
    from megamult.parameters.rectangles import boxes, rectangles
    from megamult.parameters.stated import spec_of

    mesh = start.initialize(tensor)
    rank, found = mesh.coordinates.tensor, {}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        perform_initialization=False,
        layernorm_epsilon=EPS,
    )
    for name, sizes in SIZES.items():
        mixer, values = Mixer(config, sizes, {}, mesh.groups["tensor"]), whole(name)
        found[name] = {}
        for masked in (False, True):
            hidden, documents, weights = inputs()
            gradients: dict[str, list[tuple[int, Any, Tensor]]] = {}
            with torch.no_grad():
                for key, parameter in mixer.named_parameters():
                    spec = spec_of(parameter)
                    flat, stored = parameter.view(-1), values[key]
                    starts = {s.part: s.start for s in spec.segments}
                    for r in rectangles(spec, mesh.coordinates, 0, flat.numel()):
                        part = stored[starts[r.part] : starts[r.part] + spec.parts[r.part].shape[0]]
                        for box in boxes(spec.parts[r.part].shape, r):
                            at = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
                            place = flat[r.offset + box.start : r.offset + box.start + part[at].numel()]
                            place.copy_(part[at].reshape(-1))
                    parameter.grad = None
            own = hidden.chunk(tensor)[rank] if sequence and tensor > 1 else hidden
            own = own.clone().requires_grad_()
            output = mixer(own, documents if masked else None)
            (output * (weights.chunk(tensor)[rank] if sequence and tensor > 1 else weights)).sum().backward()
            for key, parameter in mixer.named_parameters():
                spec, flat = spec_of(parameter), parameter.grad.reshape(-1)
                starts = {s.part: s.start for s in spec.segments}
                gradients[key] = []
                for r in rectangles(spec, mesh.coordinates, 0, flat.numel()):
                    for box in boxes(spec.parts[r.part].shape, r):
                        at = [(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True)]
                        piece = flat[r.offset + box.start :][: torch.Size(box.sizes).numel()].view(box.sizes)
                        gradients[key].append((starts[r.part], at, piece.clone()))
            found[name][masked] = {"output": output.detach(), "input": own.grad, "gradients": gradients}
    return found
