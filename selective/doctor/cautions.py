"""Findings: what should be mended, and what is usually done in another way."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selective import SelectiveUpdate, param_groups_for
from selective.doctor.report import Finding
from selective.doctor.subject import Subject, has_values
from selective.doctor.words import counted, in_one_line, is_or_are, listed
from selective.for_model.two_bases import kind_of
from selective.kernels import spec, why_reference
from selective.param_groups.joined_weights import JOINED_VIEWS
from selective.param_groups.settings import MATRICES
from selective.plan.advice import warn_of_needless_mask, warn_of_no_decay, warn_of_stray_keys
from selective.plan.oversized import warn_of_oversized
from selective.plan.rotation_plan import RotationPlan, warn_of_two_rotations
from selective.policies.kernel_terms import specs_of
from selective.sharding.dtensor import is_dtensor

_OURS = ("SelectiveUpdate", "ChainedOptimizer", "for_model", "selective", "param_groups_for")
_MOST_WARNINGS = 4  # of other people's code
# A step below this part of a weight is rounded away wherever the weight lies between two powers of 2: 2^-9 and 2^-12,
# for 8 and 11 significant bits.
_ROUNDED_AWAY = {torch.bfloat16: 512, torch.float16: 4096}


def mend(code: str, text: str) -> Finding:
    """Return a finding of something that is wrong."""
    return Finding(level="mend", code=code, text=text)


def advice(code: str, text: str) -> Finding:
    """Return a finding of something that is usually done in another way."""
    return Finding(level="advice", code=code, text=text)


def of_warnings(subject: Subject, wrapped: Sequence[SelectiveUpdate]) -> list[Finding]:
    """Return what was warned of while the optimizer was made, and what the library warns of in such an optimizer."""
    ours = [text for text, _ in subject.warnings if text.startswith(_OURS)]
    theirs = [f"a warning from {place}: {in_one_line(text)}" for text, place in subject.warnings if text not in ours]
    ours += [text for optimizer in wrapped for text in warnings_of(optimizer)]
    found = [mend("warned", text.removeprefix("SelectiveUpdate: ")) for text in dict.fromkeys(ours)]
    return found + [advice("other_warning", text) for text in theirs[:_MOST_WARNINGS]]


def warnings_of(optimizer: SelectiveUpdate) -> list[str]:
    """Return what the library warns of when such an optimizer is constructed."""
    base, groups = optimizer.base, optimizer.groups
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for plan in groups.plans:
            warn_of_needless_mask(base, plan.group, plan.number, plan.policy, specs_of(plan.policy))
            warn_of_stray_keys(plan.group, plan.number, plan.policy_group, base.defaults, set())
        if groups.places:
            warn_of_two_rotations(base)
            warn_of_oversized(groups.plans)
        warn_of_no_decay(base, groups.plans)
    return [str(each.message) for each in caught]


def rotates_by_itself(base: Optimizer) -> bool:
    """True if the library would warn of a preconditioner around this base."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_two_rotations(base)
    return bool(caught)


def of_model(subject: Subject) -> Iterator[Finding]:
    """Yield findings on parameters that are in the model and not in the optimizer, or the other way round."""
    if subject.model is None:
        return
    of_model = dict(subject.model.named_parameters())
    in_model = {id(p) for p in of_model.values()}
    stepped = {id(p) for p in subject.parameters}
    names = subject.names()
    strange = list(dict.fromkeys(names[p] for p in subject.parameters if id(p) not in in_model))
    if strange:
        yield mend(
            "not_in_model",
            f"{counted(len(strange), 'tensor')} of the optimizer {is_or_are(len(strange))} not in the model: "
            f"{listed(strange)}. Make the model once, move it to its device, tie its weights, and make the optimizer "
            f"after that",
        )
    left = [name for name, p in of_model.items() if p.requires_grad and id(p) not in stepped]
    if left and stepped & in_model:
        yield advice(
            "not_trained",
            f"{counted(len(left), 'tensor')} of the model with requires_grad=True {is_or_are(len(left))} in no "
            f"parameter group: {listed(left)}. Add them to a group, or call requires_grad_(False) on them",
        )


def of_groups(subject: Subject, wrapped: Sequence[SelectiveUpdate]) -> Iterator[Finding]:
    """Yield findings on which parameters are masked and rotated, and on their dtype."""
    kinds, names = kinds_of(subject), subject.names(tied=True)
    for optimizer in wrapped:
        plans = optimizer.groups.plans
        masked = [p for plan in plans if not plan.is_dense for p in plan.params.tensors]
        rotated = [p for plan in plans if plan.rotation is not None for p in plan.rotation.shapes]
        yield from _on_others(masked, kinds, names, "policy", "masks")
        yield from _on_others(rotated, kinds, names, "preconditioner", "rotates")
        yield from _on_joined([plan.rotation for plan in plans if plan.rotation is not None], kinds, names)
        keep_residue = any(plan.capture.facts.residue for plan in plans)
        if not (optimizer.options.rounding or keep_residue):
            yield from _low_precision(masked)


def of_decay(subject: Subject) -> Iterator[Finding]:
    """Yield a finding if biases and norms decay."""
    kinds, names = kinds_of(subject), subject.names()
    decayed = [
        p
        for group in subject.optimizer.param_groups
        if not isinstance(decay := group.get("weight_decay", 0), Tensor) and decay
        for p in group["params"]
        if kinds.get(id(p)) == "vectors"
    ]
    if decayed:
        yield advice(
            "decays_vectors",
            f"weight_decay reaches biases, norms or other vectors ({listed([names[p] for p in decayed])}). They "
            f"usually have none: param_groups_for(model, weight_decay=...) leaves it out there",
        )


def of_kernels(wrapped: Sequence[SelectiveUpdate], kernels: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    """Yield a finding if parameters on a GPU are stepped without kernels.

    `kernels` are titles of groups with the text of `explain()` on their kernels.
    """
    on_gpu = any(p.is_cuda for optimizer in wrapped for plan in optimizer.groups.plans for p in plan.params.tensors)
    why = _why_no_triton() if on_gpu else None
    if why is not None:
        yield mend(
            "no_triton", f"{why}. Until then plain torch steps the parameters on the GPU, in several times the time"
        )
        return
    for title, text in kernels:
        if text.startswith("reference"):
            yield advice("no_kernels", f"{title}: no kernel steps it, but the {text}, in several times the time")


def of_values(not_finite: Sequence[str]) -> Iterator[Finding]:
    """Yield a finding if parameters are not finite before any step. `not_finite` has their names."""
    if not_finite:
        yield mend(
            "not_finite_before",
            f"{listed(not_finite)} ha{'s' if len(not_finite) == 1 else 've'} a NaN or an infinity before any step. "
            f"Look at how the model is initialised or loaded",
        )


def kinds_of(subject: Subject) -> dict[int, str]:
    """Return the kind of each parameter by `id`: "matrices", "vectors", "embeddings" and others of `param_groups_for`.

    Of weights that are known to hold several matrices it is how they lie: "rows:3". Without a model only vectors are
    known.
    """
    model = subject.model
    if model is not None and not any(nn.parameter.is_lazy(p) for p in model.parameters()):
        if any(p.requires_grad for p in model.parameters()):
            groups = param_groups_for(model, parts="auto", ask=True)
            return {id(p): kind_of(group) for group in groups for _, p in group["params"]}
    present = [p for p in subject.parameters if has_values(p)]
    return {id(p): "vectors" for p in present if p.dim() < 2 or p.numel() == max(p.shape)}


def _on_others(
    params: Sequence[Tensor], kinds: Mapping[int, str], names: Mapping[Tensor, str], what: str, does: str
) -> Iterator[Finding]:
    """Yield a finding if there are other parameters than matrices among these."""
    of_kind: dict[str, list[Tensor]] = {}
    for p in params:
        kind = kinds.get(id(p), "matrices")
        if kind not in MATRICES:
            of_kind.setdefault(kind, []).append(p)
    if of_kind:
        others = "; ".join(f"{kind}: {listed([names[p] for p in ps])}" for kind, ps in of_kind.items())
        yield advice(
            f"{does}_others",
            f"the {what} {does} more than the matrices inside of the model ({others}). Usually the base alone steps "
            f"those: SelectiveUpdate.for_model(model, ...) does it so, and so does {what}=None in a parameter group",
        )


def _on_joined(
    rotations: Iterable[RotationPlan], kinds: Mapping[int, str], names: Mapping[Tensor, str]
) -> Iterator[Finding]:
    """Yield a finding if weights that hold several matrices are rotated as one."""
    by_view: dict[str, list[str]] = {}
    for rotation in rotations:
        for p in rotation.shapes:
            kind = kinds.get(id(p), "matrices")
            if kind in JOINED_VIEWS and rotation.matrix_view not in JOINED_VIEWS and not is_dtensor(p):
                by_view.setdefault(kind, []).append(names[p])
    if by_view:
        joined = "; ".join(f"matrix_view={view!r}: {listed(of_view)}" for view, of_view in by_view.items())
        yield advice(
            "rotates_joined",
            f"the preconditioner rotates weights as one matrix that hold several ({joined}). Usually each of them has "
            f"a basis of its own: SelectiveUpdate.for_model(model, ...) and param_groups_for(model, parts='auto') do "
            f"it so, and so does such a matrix_view in a parameter group",
        )


def _low_precision(masked: Sequence[Tensor]) -> Iterator[Finding]:
    """Yield a finding if there are weights of 16 bits among these."""
    for dtype, part in _ROUNDED_AWAY.items():
        count = sum(p.dtype == dtype for p in masked)
        if count:
            yield advice(
                "low_precision",
                f"{counted(count, 'tensor')} {is_or_are(count)} {str(dtype).removeprefix('torch.')}, where a step "
                f"below 1/{part} of a weight is rounded away. Pass stochastic_rounding=True, by which small steps "
                f"arrive on average, or train float32 weights under autocast",
            )


def _why_no_triton() -> str | None:
    """Return the reason why Triton can't be imported; None if it can. Kernels take every plain float32 tensor."""
    plain = torch.zeros(1)
    return why_reference(spec.Item(plain, plain, {}, 0), spec.GivenRule())
