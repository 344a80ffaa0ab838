"""Soap and AdaDiag: `Eigenbasis` with the settings of their papers. All of its options can be given."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from selective.preconditioner.eigenbasis import Eigenbasis
from selective.preconditioner.gram import Sides
from selective.preconditioner.linalg import Precision
from selective.preconditioner.solvers import SolverName


class AdaDiag(Eigenbasis):
    """AdaDiag: rotate into the singular vectors of the current gradient. AdaDiag++ is `AdaDiag(sides="two")`.

    Source: arXiv 2502.07488, as other papers restate it. Every T steps, G = P Σ Qᵀ is the SVD of the gradient of that
    step. The base then steps on PᵀG (AdaDiag) or PᵀGQ (AdaDiag++). T is 200 to 500 there. We differ from it in these
    points:

    - The paper leaves moments as they are (`carry="keep"`). We carry them into the new basis, which measured better.
    - With one side, we rotate the smaller one, and not always the rows.
    - We use "eigh" of the Gram matrix, because an SVD takes ten times as long on a GPU (`solver="svd"` is the paper's).
      The vectors are the same, but those with singular values below 3e-4 of the largest are mixed with each other.
    - Rounding noise right after a refresh is set to 0 (`floor=0` leaves it).
    - A side that is too long, or out of proportion to its matrix, is not rotated (`max_dim`, `max_state_ratio`).
    - Embeddings, heads and vectors are not rotated.

    All parameters are refreshed in the same step, unless `stagger=True`.
    """

    sides: Sides = "one"
    statistic: Literal["gradient", "ema"] = "gradient"
    refresh_every: int = Field(default=200, ge=1)
    solver: SolverName = "eigh"
    precision: Precision = "float32"


class Soap(Eigenbasis):
    """SOAP: rotate both sides into eigenvectors of running Gram matrices, which are followed by a step every ten steps.

    Source: arXiv 2409.11321, algorithms 3 and 4. There β is 0.95, and the first basis is made by eigh. Columns are
    sorted by their estimated eigenvalues. First moments are projected into the new basis, and second moments are
    permuted with the columns. Statistics are updated after the weights have moved. The first step only initialises the
    statistics, and no weight moves. Around AdamW with betas=(0.95, 0.95) `Soap(carry="rotate", solver="qr",
    precision="float32")` is SOAP. By default we differ from it in these points:

    - Second moments are carried by the squared maps. If they are permuted, a second moment can be 0 under a first
      moment that is not: on one-hot inputs, SOAP's steps grow to 10⁴ learning rates, and its loss rises.
    - The basis of the power step and its QR is computed with products and Cholesky factors. It spans the same spaces,
      in a fraction of the time on a GPU.
    - The products of a step are in TF32 on a GPU.
    - The Gram matrix of one gradient has a low rank. The power step leaves columns in its null space as they are; a QR
      of the product alone would make columns from rounding errors.
    - A side longer than `max_dim` is not rotated, as in SOAP. Vectors are never rotated; in SOAP this is the default.
    - A side that is out of proportion to its matrix is not rotated: the long side of an adapter, say.
      `max_state_ratio=None` rotates it, as SOAP does.

    All parameters are refreshed in the same step, unless `stagger=True`.
    """

    skip_first_step: bool = True
