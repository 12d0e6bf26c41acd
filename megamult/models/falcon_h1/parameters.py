"""Standard deviations of a Falcon-H1 model's initial weights."""

from __future__ import annotations

import math

from megamult.models.common.mamba2.roles import IN_PROJECTION
from megamult.models.common.parameters import standard_deviations as of_decoder
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.parameters.spec import Role


def standard_deviations(sizes: FalconH1Config) -> dict[Role, float]:
    """Return the standard deviation of initial weights for each role that is drawn from a normal distribution.

    Those of projections into the residual stream are divided by the square root of their number, the mixers' included,
    as Megatron-Core divides by sqrt(layers) if each layer is one mixer.
    """
    into_stream = sizes.init_std / math.sqrt(sizes.projections_into_stream)
    found: dict[Role, float] = dict.fromkeys(IN_PROJECTION, sizes.init_std)
    found |= dict.fromkeys(("ssm_out", "ssm_out_normed"), into_stream)
    factors = sizes.init_std_factors
    return of_decoder(sizes) | {role: value * factors.get(role, 1.0) for role, value in found.items()}
