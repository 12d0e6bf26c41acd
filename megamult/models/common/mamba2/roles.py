"""Roles of the mixer's logical tensors, and the multipliers that they get (arXiv 2601.04890).

Row multipliers of x, B and C are redundant with the convolution's weights, which scale the same channels, and columns
of all five with the weights of the norm before the mixer. z passes a SiLU and dt a softplus, so their rows have no such
factor. The columns of the output projection are redundant only with the weights of an inner norm.
"""

from __future__ import annotations

from megamult.parameters.roles import ROW_COL, Role, register
from megamult.parameters.spec import Side

_ROW: frozenset[Side] = frozenset({"row"})

IN_PROJECTION = ("ssm_z", "ssm_x", "ssm_b", "ssm_c", "ssm_dt")
"""Roles of the matrices of the input projection, in the order of its rows."""

_MIXER = (
    Role("ssm_z", ROW_COL, symmetry_free=_ROW),
    Role("ssm_x", ROW_COL),
    Role("ssm_b", ROW_COL),
    Role("ssm_c", ROW_COL),
    Role("ssm_dt", ROW_COL, symmetry_free=_ROW),
    Role("ssm_out", ROW_COL, symmetry_free=ROW_COL),
    Role("ssm_out_normed", ROW_COL, symmetry_free=_ROW),  # the output projection after an inner norm
    Role("ssm_conv", orthogonalized=False, decay=False),
    Role("ssm_a", orthogonalized=False, decay=False),
    Role("ssm_d", orthogonalized=False, decay=False),
    Role("ssm_dt_bias", orthogonalized=False, decay=False),
    Role("ssm_norm", orthogonalized=False, decay=False),
)
register(*_MIXER)
IN_MIXER = tuple(role.name for role in _MIXER)
"""Roles of the mixer's tensors; its convolution's bias has the role `bias`."""
