"""From one basis to the next: what the base's moments have to be multiplied with, and which column went where."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selective.preconditioner.linalg import float32_products, identity_like, per_matrix

CarryName = Literal["squared", "rotate", "keep"]


@float32_products()
def turn(new: Tensor, old: Tensor, changed: Tensor | None) -> Tensor:
    """newᵀ old, [batch, n, n]: takes coordinates in the old basis to those in the new one.

    Both are orthogonal, so m = old m̃ = new (newᵀ old) m̃ is the same tensor before and after. Where nothing `changed`
    ([batch]; None: all has) it is exactly the identity, so that what is carried keeps its bits.
    """
    product = new.mT @ old
    return product if changed is None else torch.where(per_matrix(changed), product, identity_like(product))


def order_of(order: Tensor | None, changed: Tensor, basis: Tensor) -> Tensor:
    """Which old column each new one was, [batch, n]; in their places where nothing changed, or nothing was sorted."""
    places = torch.arange(basis.shape[-1], device=basis.device).expand(basis.shape[0], -1)
    return places if order is None else torch.where(changed[:, None], order, places)
