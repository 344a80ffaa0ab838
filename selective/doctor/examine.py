"""`doctor`: makes the optimizer, looks at it, takes steps, and puts everything back."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch

from selective import Cautious, SelectiveUpdate, __version__
from selective.doctor import cautions
from selective.doctor.cautions import advice, mend
from selective.doctor.facts import described, groups_of, memory_of, steps_of, wrapped_in
from selective.doctor.report import FINE, TO_MEND, Finding, Report, Steps, Trial
from selective.doctor.restore import restored
from selective.doctor.subject import Factory, Model, Subject, has_values, load_subject
from selective.doctor.take_steps import SIZE, not_finite, take_steps
from selective.doctor.words import listed
from selective.generators import generators_restored


def doctor(factory: Factory, *, model: Model | None = None, lr: float = 1e-3, device: str | None = None) -> Report:
    """Look at an optimizer before it trains: what it will do, what it costs, and what should be mended first.

        report = doctor(make_optimizer, model=model)
        print(report)
        assert report.exit_code == 0

    It takes steps on random gradients: two to begin with (seven on a GPU, until kernels are compiled and a CUDA graph
    is recorded), and three that are timed. Then the parameters, their gradients, the optimizer's state and the random
    generators are bit for bit what they were. That takes the memory of one more copy of the parameters, of their state
    and of one gradient each.

    A bare optimizer is also wrapped for a trial, with `policy=Cautious()`, and stepped on the same gradients.

    Args:
        factory: a function that makes the optimizer, an optimizer, or a pair of model and optimizer. The function takes
            nothing, or the model, or its parameters; a parameter `lr` without a default gets `lr`. It returns an
            optimizer, or a tuple, list or dictionary in which there is one, and perhaps the model. Or its name:
            `module:name` or `path/to/file.py:name`.
        model: the model, a function that makes it, or the name of one of them. With a model, parameters have names, and
            embeddings, heads and norms are told from matrices.
        lr: the learning rate for a factory that needs one.
        device: where `model` is moved before the factory is called; None: it stays where it is.

    Raises:
        CannotLoad: the optimizer can't be made. The message is one line with the place in your code.
    """
    with generators_restored():
        return _examine(load_subject(factory, model, lr, device))


def _examine(subject: Subject) -> Report:
    optimizer = subject.optimizer
    wrapped = wrapped_in(optimizer)
    names = subject.names()
    findings = cautions.of_warnings(subject, wrapped)
    findings += cautions.of_values(not_finite(subject.parameters, names))
    findings += cautions.of_model(subject)
    trial = None
    with restored(optimizer):
        taken = take_steps(optimizer, names)
        groups = groups_of(optimizer, names)
        memory = memory_of(optimizer, subject.parameters) if taken.times else None
        steps = steps_of(taken, groups, bool(wrapped))
    if not wrapped:
        trial, about_trial = _wrap_for_trial(subject)
        findings += about_trial
    kernels = [(group.title, text) for group in groups for text in group.facts.get("kernels", [])]
    findings += [*cautions.of_groups(subject, wrapped), *cautions.of_decay(subject)]
    findings += cautions.of_kernels(wrapped, kernels)
    if trial is None or trial.refusal is None:  # otherwise the refusal says why steps fail
        findings += _of_steps(steps, findings)
    ready = [p for p in subject.parameters if has_values(p)]
    return Report(
        versions={"selective": __version__, "torch": torch.__version__, "python": platform.python_version()},
        optimizer=described(optimizer),
        wrapped=bool(wrapped),
        tensors=len(subject.parameters),
        elements=sum(p.numel() for p in ready),
        devices=sorted({str(p.device) for p in subject.parameters}),
        dtypes=sorted({str(p.dtype).removeprefix("torch.") for p in subject.parameters}),
        groups=groups,
        memory=memory,
        steps=steps,
        trial=trial,
        findings=findings,
        exit_code=TO_MEND if any(finding.level == "mend" for finding in findings) else FINE,
    )


def _of_steps(steps: Steps, before: Sequence[Finding]) -> list[Finding]:
    """Return findings on steps that failed, or that made a NaN."""
    found = []
    if steps.failure is not None:
        found.append(mend("step_failed", steps.failure))
    known = any(finding.code == "not_finite_before" for finding in before)
    if steps.not_finite and not known:
        found.append(
            mend(
                "not_finite",
                f"{listed(steps.not_finite)}: a NaN or an infinity after {steps.taken} steps on gradients of size "
                f"{SIZE}. Look at the learning rate, at eps (a float16 can't hold 1e-8), and at the dtype of the state",
            )
        )
    return found


def _wrap_for_trial(subject: Subject) -> tuple[Trial, list[Finding]]:
    """Wrap a bare optimizer, take the same steps, and unwrap it. Return this trial, and what is to be known before."""
    optimizer, policy = subject.optimizer, Cautious()
    found: list[Finding] = []
    if cautions.rotates_by_itself(optimizer):
        name = type(optimizer).__name__
        found.append(
            advice(
                "rotates_by_itself",
                f"{name} rotates or orthogonalises gradients by itself: wrap it with a policy, and with no "
                f"preconditioner",
            )
        )
    names = subject.names()
    with restored(optimizer):
        try:
            wrapper = SelectiveUpdate(optimizer, policy=policy)
        except (ValueError, TypeError, RuntimeError) as error:
            refusal = str(error).removeprefix("SelectiveUpdate: ")
            trial = Trial(policy=repr(policy), refusal=refusal, groups=[], memory=None, steps=None)
            return trial, [*found, mend("cannot_be_wrapped", refusal)]
        found += [advice("if_wrapped", text) for text in cautions.warnings_of(wrapper)]
        taken = take_steps(wrapper, names)
        groups = groups_of(wrapper, names)
        memory = memory_of(wrapper, subject.parameters) if taken.times else None
        steps = steps_of(taken, groups, wrapped=True)
    if taken.failure is not None:
        found.append(advice("trial_failed", f"wrapped in {policy!r}, {taken.failure}"))
    return Trial(policy=repr(policy), refusal=None, groups=groups, memory=memory, steps=steps), found
