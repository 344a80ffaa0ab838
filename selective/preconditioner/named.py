"""The papers' settings of `Eigenbasis`, by name. All of its options can be given here, too."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from selective.preconditioner.eigenbasis import Eigenbasis
from selective.preconditioner.gram import Sides
from selective.preconditioner.solvers import SolverName


class AdaDiag(Eigenbasis):
    """AdaDiag: the space of the current gradient's singular vectors. AdaDiag++ is `AdaDiag(sides="two")`.

    Source: arXiv 2502.07488, as others restate it: every T steps G = P Σ Qᵀ of that step's gradient, then the base on
    PᵀG (AdaDiag) or PᵀGQ (AdaDiag++). T is 200 to 500 there. How we differ:

    - moments: the paper keeps them as they are (`carry="keep"`); ours follow into the new basis, which measured better;
    - one side is the smaller one, not always the rows;
    - "eigh" of the Gram matrix instead of an SVD, which takes ten times as long on a GPU: the same vectors, but those
      with singular values below 3e-4 of the largest are mixed among themselves (`solver="svd"` is the paper's);
    - what is rounding noise right after a refresh is set to 0 (`floor=0` leaves it);
    - embeddings, heads and vectors are the base's alone.

    All parameters are refreshed in the same step, unless `stagger=True`.
    """

    sides: Sides = "one"
    statistic: Literal["gradient", "ema"] = "gradient"
    refresh_every: int = Field(default=200, ge=1)
    solver: SolverName = "eigh"
    stagger: bool = False


class Soap(Eigenbasis):
    """SOAP's space: both sides' running Gram matrices, one power step and a QR every ten steps.

    Source: arXiv 2409.11321: β = 0.95; first basis by eigh; columns sorted by the estimated eigenvalue, first moment
    re-projected, second moment permuted along; statistics after the weights have moved; the first step only initialises
    the statistics, nothing moves. Around AdamW with betas=(0.95, 0.95) and with carry="rotate" this is SOAP. How we
    differ:

    - second moments follow by the squared maps. Permuted along, as SOAP's are, one can be 0 under a first moment that
      is not: on one-hot inputs SOAP's steps grow to 10⁴ learning rates and its loss rises;
    - one gradient's Gram matrix is of low rank; in its null space the power step leaves columns as they are, where a
      QR of rounding errors would make some;
    - a side longer than `max_dim` is not rotated (theirs too), and vectors are the base's alone (theirs: by default).

    All parameters are refreshed in the same step, unless `stagger=True`; `solver="cholesky"` spans the same
    space with operations that a GPU is faster at.
    """

    skip_first_step: bool = True
    solver: SolverName = "qr"
    stagger: bool = False
