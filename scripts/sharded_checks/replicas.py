"""After a training, all ranks have the same bits of parameters and state, whatever each has drawn by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from selective import MGUP, Cautious, Eigenbasis, Magma, RandomMask, SelectiveUpdate
from selective.compare.model import loss as next_token_loss

from .layouts import Layout, as_bytes, whole
from .model import SIZES, Llama
from .processes import deterministic
from .results import Result

POLICIES = (MGUP(), Cautious(), RandomMask(), Magma(), RandomMask.matching(MGUP()))
BATCH, BATCHES = 2, 4  # windows of a rank, and different batches, so that the loss falls


def replicas(layout: Layout, steps: int, **options: Any) -> Iterator[Result]:
    """Train with five policies, and with a rotation. `options` are those of the wrapper."""
    spaces = {"five policies": None, "rotated": Eigenbasis(sides="unsharded", refresh_every=20)}
    for name, space in spaces.items():
        with deterministic(layout.ranks):
            optimizer, params, losses = trained(layout, steps, preconditioner=space, **options)
        differing = differing_entries(layout, optimizer, params)
        falls = all(torch.isfinite(torch.tensor(losses))) and (steps < 100 or losses[-1] < losses[0])
        said = f"the same bits after {steps} steps" if not differing else f"other bits: {', '.join(differing[:4])}"
        said += f", loss {losses[0]:.3f} to {losses[-1]:.3f}"
        numbers = {"steps": steps, "entries_that_differ": len(differing), "losses": [losses[0], losses[-1]]}
        yield Result("replicas", layout.name, name, not differing and falls, said, numbers)


def trained(layout: Layout, steps: int, **options: Any) -> tuple[SelectiveUpdate, dict[str, Tensor], list[float]]:
    """Train the small model, each share of the batches on its ranks. The global seeds differ between ranks."""
    ranks, size = layout.ranks, SIZES["tiny"]
    torch.manual_seed(ranks.rank)
    model = layout.cut_model(Llama(size, ranks.device))
    params: dict[str, Tensor] = dict(model.named_parameters())
    members = list(params.values())
    groups = [{"params": members[i :: len(POLICIES)], "policy": policy} for i, policy in enumerate(POLICIES)]
    options.setdefault("seed", 1)
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups, lr=1e-3), **options)
    losses: list[float] = []
    share, shares = layout.batches
    for step in range(steps):
        values = torch.Generator().manual_seed(step % BATCHES)
        windows = torch.randint(size.vocabulary, (shares, BATCH, size.context), generator=values)
        loss = next_token_loss(model, windows[share].to(ranks.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return optimizer, params, losses


def differing_entries(layout: Layout, optimizer: SelectiveUpdate, params: dict[str, Tensor]) -> list[str]:
    """Return the names of parameters, entries of state and statistics that are not the same bits on all ranks.

    A cut tensor is gathered over its mesh: each replica makes a whole of its own parts.
    """
    names = list(params)
    found = {name: whole(p) for name, p in params.items()}
    ids = {id(p): name for name, p in params.items()}
    order = [ids[id(p)] for group in optimizer.param_groups for p in group["params"]]
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                found[f"{order[index]} {key}"] = whole(value)
    for name, one in optimizer.statistics().items():
        found |= {f"statistics {name} {key}": torch.as_tensor(value) for key, value in one.items()}
    digests = {name: hashlib.sha256(as_bytes(x.cpu()).numpy().tobytes()).hexdigest() for name, x in found.items()}
    everywhere = layout.ranks.gathered(digests)
    assert len(found) > len(names), "there is no state"
    return sorted(name for name in set().union(*everywhere) if len({each.get(name) for each in everywhere}) > 1)
