"""The doctor's findings: for each an optimizer that has it, and one that does not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selective import MGUP, Cautious, ChainedOptimizer, Policy, SelectiveUpdate, Soap
from selective.doctor import Report, cautions, doctor
from selective.doctor.text import WIDTH

MOST_LINES = 40  # a screen


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)


def codes(report: Report, level: str) -> list[str]:
    return [finding.code for finding in report.findings if finding.level == level]


def text_of(report: Report, code: str) -> str:
    (text,) = [finding.text for finding in report.findings if finding.code == code]
    return text


def for_model(net: nn.Module, **options: Any) -> Any:
    return SelectiveUpdate.for_model(net, "adamw", **{"lr": 1e-3, "weight_decay": 0.1, "policy": "cautious", **options})


def test_a_fine_optimizer_has_no_finding() -> None:
    net = model()
    report = doctor(lambda: for_model(net, preconditioner="soap"), model=net)
    assert report.findings == []
    assert report.exit_code == 0
    assert report.wrapped
    assert report.optimizer == "SelectiveUpdate over torch.optim.adamw.AdamW"
    elements = sum(p.numel() for p in net.parameters())
    assert (report.tensors, report.elements) == (7, elements)
    (matrices, others) = report.groups
    assert matrices.facts["capture"][0].startswith("fused: ")
    assert matrices.facts["policy"] == ["Cautious()"]
    assert "need an NVIDIA GPU" in matrices.facts["kernels"][0]
    assert "Soap()" in matrices.facts["rotated"][0]
    assert others.facts["capture"][0].startswith("dense: ")
    assert report.steps.taken == 5
    assert len(report.steps.host_ms) == 3
    assert all(time > 0 for time in report.steps.host_ms)
    assert report.steps.graph is False
    said = str(report)
    assert said.endswith("Nothing to mend. Everything is as it was before the steps.")
    assert max(map(len, said.splitlines())) <= WIDTH
    assert len(said.splitlines()) <= MOST_LINES


@pytest.mark.parametrize(
    ("times", "unsteady"), [([1.0, 2.9, 2.0], False), ([1.0, 2.0, 3.1], True), ([250.0] * 3, False)]
)
def test_times_that_differ_widely_are_marked(times: list[float], unsteady: bool) -> None:
    report = doctor(for_model(model()))
    said = str(report.model_copy(update={"steps": report.steps.model_copy(update={"host_ms": times})}))
    assert ("is the machine busy?" in " ".join(said.split())) == unsteady
    assert f"{times[0]:.3g}, " in said


def test_memory_is_what_the_optimizer_holds_after_a_step() -> None:
    net = model()
    optimizer = SelectiveUpdate(
        torch.optim.AdamW(net.parameters(), foreach=False), policy=MGUP(), preconditioner=Soap(), momentum_beta=0.9
    )
    memory = doctor(optimizer, model=net).memory
    for _ in range(2):  # the first gradient of a matrix only makes its bases
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    held = {"base": 0, "selection": 0, "rotation": 0}
    for entries in optimizer.state.values():
        for name, value in entries.items():
            if name in ("step", "exp_avg", "exp_avg_sq"):
                held["base"] += value.nbytes
            elif name == "selective/momentum":
                held["selection"] += value.nbytes
            elif name.startswith("selective/basis/"):
                held["rotation"] += value.nbytes
    assert min(held.values()) > 0
    assert memory is not None
    assert {name: getattr(memory, name) for name in held} == held
    assert memory.parameters == 4 * memory.elements


class CautiousSGD(torch.optim.SGD):
    """A base that masks by itself, as it says in its groups."""

    def __init__(self, params: Any, caution: bool) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.param_groups[0]["caution"] = caution


def sgd(momentum: float) -> Callable[[nn.Module], Any]:
    return lambda model: SelectiveUpdate(
        torch.optim.SGD([model[1].weight], lr=0.1, momentum=momentum), policy=Cautious()
    )


def cautious_twice(caution: bool) -> Callable[[nn.Module], Any]:
    return lambda model: SelectiveUpdate(CautiousSGD([model[1].weight], caution), policy=Cautious())


def rotated(base: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    return lambda model: SelectiveUpdate(base([model[1].weight], lr=0.1), preconditioner=Soap())


@pytest.mark.parametrize(
    ("wrong", "right", "says"),
    [
        (sgd(0.0), sgd(0.9), "selects every coordinate of SGD without momentum"),
        (cautious_twice(True), cautious_twice(False), "masks what CautiousSGD has masked already"),
        (rotated(torch.optim.Muon), rotated(torch.optim.AdamW), "the second rotation undoes or repeats"),
    ],
    ids=["no momentum", "cautious twice", "rotated twice"],
)
def test_what_the_library_warns_of_has_to_be_mended(wrong: Any, right: Any, says: str) -> None:
    net = model()
    report = doctor(wrong, model=net)
    assert says in text_of(report, "warned")
    assert report.exit_code == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = wrong(net)
    assert says in text_of(doctor(made, model=net), "warned")  # also where the warning came before
    fine = doctor(right, model=net)
    assert codes(fine, "mend") == []
    assert fine.exit_code == 0


def test_a_key_that_is_misspelt_is_found() -> None:
    net = model()
    groups = [{"params": [net[1].weight], "polcy": "mgup"}]
    report = doctor(lambda: SelectiveUpdate(torch.optim.AdamW(groups), policy=Cautious()))
    assert "did you mean 'policy'?" in text_of(report, "warned")


def test_warnings_of_the_users_own_code_are_passed_on() -> None:
    net = model()

    def make() -> Any:
        warnings.warn("something is old", DeprecationWarning, stacklevel=1)
        return for_model(net)

    report = doctor(make, model=net)
    assert text_of(report, "other_warning").startswith("a warning from ")
    assert text_of(report, "other_warning").endswith(": something is old")
    assert report.exit_code == 0


def test_policies_rotations_and_decay_on_other_parameters_than_matrices() -> None:
    net = model()
    base = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    report = doctor(SelectiveUpdate(base, policy=Cautious(), preconditioner=Soap()), model=net)
    assert codes(report, "advice") == ["masks_others", "rotates_others", "decays_vectors"]
    assert "embeddings: 0.weight; vectors: 1.bias, 2.weight, 2.bias, 3.bias" in text_of(report, "masks_others")
    assert "(embeddings: 0.weight)" in text_of(report, "rotates_others")
    assert report.groups[0].facts["rotated"][0].startswith("0.weight as 8 x 4; 1.weight as 6 x 4; ")
    assert report.exit_code == 0
    without_model = doctor(SelectiveUpdate(torch.optim.AdamW(net.parameters(), weight_decay=0), policy=Cautious()))
    assert codes(without_model, "advice") == ["masks_others"]
    assert "embeddings" not in text_of(without_model, "masks_others")  # nobody says what a matrix is for


@pytest.mark.parametrize(("dtype", "part"), [(torch.bfloat16, 512), (torch.float16, 4096)])
def test_low_precision_without_stochastic_rounding(dtype: torch.dtype, part: int) -> None:
    net = model(dtype)
    report = doctor(for_model(net, eps=1e-4), model=net)
    assert f"a step below 1/{part} of a weight is rounded away" in text_of(report, "low_precision")
    ones = torch.full((1,), 1.9, dtype=dtype)  # such a step is lost, even next to the end of the range of an exponent
    assert torch.equal(ones - ones / (1.02 * part), ones)
    assert doctor(for_model(net, eps=1e-4, stochastic_rounding=True), model=net).findings == []


def test_parameters_of_another_model() -> None:
    net, other = model(), model()
    report = doctor(for_model(other), model=net)
    assert "7 tensors of the optimizer are not in the model" in text_of(report, "not_in_model")
    assert report.exit_code == 1
    some = SelectiveUpdate(torch.optim.AdamW([net[1].weight]), policy=Cautious())
    report = doctor(some, model=net)
    assert "6 tensors of the model with requires_grad=True are in no parameter group" in text_of(report, "not_trained")
    net.requires_grad_(False)
    net[1].weight.requires_grad_(True)
    assert doctor(some, model=net).findings == []


def test_values_that_are_not_finite() -> None:
    net = model()
    report = doctor(infinite_rate(net), model=net)
    assert "1.weight" in text_of(report, "not_finite")
    assert report.steps.not_finite == ["1.weight"]
    assert report.exit_code == 1
    with torch.no_grad():
        net[1].weight[0, 0] = math.nan
    report = doctor(for_model(net), model=net)
    assert codes(report, "mend") == ["not_finite_before"]


def infinite_rate(net: nn.Module) -> SelectiveUpdate:
    return SelectiveUpdate(torch.optim.AdamW([net[1].weight], lr=1e38), policy=Cautious())


class HasNoLuck(Policy):
    """A policy whose code raises."""

    def mask(self, view: Any) -> Tensor:
        raise RuntimeError("no such luck")


def test_a_step_that_raises() -> None:
    net = model()
    report = doctor(for_model(net, policy=HasNoLuck()), model=net)
    failure = text_of(report, "step_failed")
    assert failure.startswith("step 1 raises PolicyError: SelectiveUpdate: HasNoLuck failed in step 0")
    assert "test_findings.py, line" in failure
    assert report.steps.taken == 0
    assert report.memory is None
    assert "none could be taken" in str(report)


def test_a_bare_optimizer_is_wrapped_for_a_trial() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0)
    report = doctor(optimizer, model=net)
    assert not report.wrapped
    assert report.groups == []
    assert report.findings == []
    assert report.trial is not None
    assert report.trial.refusal is None
    assert report.trial.groups[0].facts["capture"][0].startswith("fused: ")
    assert report.memory is not None
    assert report.trial.memory == report.memory  # a policy adds nothing
    assert report.trial.steps is not None
    assert report.trial.steps.taken == report.steps.taken == 5
    assert not optimizer.state


def test_what_is_said_of_bare_optimizers_before_they_are_wrapped() -> None:
    net = model()
    plain = doctor(torch.optim.SGD([net[1].weight], lr=0.1))
    assert "selects every coordinate of SGD" in text_of(plain, "if_wrapped")
    assert plain.exit_code == 0
    assert codes(doctor(torch.optim.Muon([net[1].weight])), "advice") == ["rotates_by_itself"]
    refused = doctor(torch.optim.LBFGS([net[1].weight]))
    assert "requires a closure" in text_of(refused, "cannot_be_wrapped")
    assert codes(refused, "mend") == ["cannot_be_wrapped"]
    assert "It can't be wrapped" in str(refused)


def test_the_members_of_a_chain() -> None:
    net = model()
    matrices, rest = [net[1].weight, net[3].weight], [p for p in net.parameters() if p.dim() < 2]
    chain = ChainedOptimizer(
        {
            "matrices": SelectiveUpdate(torch.optim.Muon(matrices), policy=Cautious()),
            "rest": torch.optim.AdamW([*rest, net[0].weight], weight_decay=0),
        }
    )
    report = doctor(chain, model=net)
    assert report.wrapped
    assert [group.title.partition(" (")[0] for group in report.groups] == [
        "member 'matrices', param_groups[0]: 2 tensors, 42 elements",
        "member 'rest', param_groups[0]: 5 tensors, 53 elements",
    ]
    assert report.groups[1].facts == {
        "policy": ["none"],
        "capture": ["none: torch.optim.adamw.AdamW steps these by itself"],
    }
    assert "AdamW steps these by itself" in " ".join(str(report).split())
    assert report.optimizer.startswith("ChainedOptimizer of SelectiveUpdate over torch.optim")
    assert report.memory is not None
    of_muon = sum(p.numel() for p in matrices)
    of_adamw = 8 * (report.elements - of_muon) + 4 * (len(rest) + 1)
    assert report.memory.base == 4 * of_muon + of_adamw


def test_a_bare_members_groups_share_a_paragraph() -> None:
    net = model()
    bare = torch.optim.AdamW([{"params": [p], "name": name} for name, p in net[2:].named_parameters()])
    wrapped = SelectiveUpdate(torch.optim.AdamW([net[1].weight]), policy=Cautious())
    (_, group) = doctor(ChainedOptimizer({"first": wrapped, "bare": bare})).groups
    named = "(2.weight, 2.bias, 3.weight, 3.bias)"
    assert group.title == f"member 'bare', param_groups[0] to [3] {named}: 4 tensors, 33 elements"
    assert group.numbers == [0, 1, 2, 3]


class Attention(nn.Module):
    """An attention whose queries, keys and values are joined, and a stack of experts whose halves are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(2, 6, 4))


def rotated_groups(net: Attention, **of_qkv: Any) -> SelectiveUpdate:
    groups = [
        {"params": [net.qkv.weight], **of_qkv},
        {"params": [net.gate_up_proj, net.down_proj], "matrix_view": "experts"},
    ]
    return SelectiveUpdate(torch.optim.AdamW(groups, weight_decay=0), preconditioner=Soap())


def test_weights_that_are_several_matrices_and_are_rotated_as_one() -> None:
    net = Attention()
    report = doctor(rotated_groups(net), model=net)
    assert codes(report, "advice") == ["rotates_joined"]
    said = text_of(report, "rotates_joined")
    assert "(matrix_view='rows:3': qkv.weight; matrix_view='rows:2': gate_up_proj)" in said
    assert report.exit_code == 0
    assert doctor(rotated_groups(net)).findings == []  # without the model nobody says what a weight is for
    apart = doctor(rotated_groups(net, matrix_view="rows:3"), model=net)
    assert "(matrix_view='rows:2': gate_up_proj)" in text_of(apart, "rotates_joined")
    left = doctor(rotated_groups(net, preconditioner=None, policy="cautious"), model=net)
    assert "qkv" not in text_of(left, "rotates_joined")  # a mask is of coordinates, whatever a matrix is
    assert doctor(for_model(net, preconditioner="soap"), model=net).findings == []


def test_tied_weights_have_all_their_names() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(8, 4), "inside": nn.Linear(4, 4), "head": nn.Linear(4, 8, bias=False)})
    optimizer = SelectiveUpdate(torch.optim.AdamW(net.parameters(), weight_decay=0), policy=Cautious())
    assert "embeddings: embed.weight; " in text_of(doctor(optimizer, model=net), "masks_others")
    net["head"].weight = net["embed"].weight
    late = doctor(optimizer, model=net)
    assert "1 tensor of the optimizer is not in the model: param_groups[0][3]. " in text_of(late, "not_in_model")
    assert "tie its weights, and make the optimizer after that" in text_of(late, "not_in_model")
    tied = SelectiveUpdate(torch.optim.AdamW(net.parameters(), weight_decay=0), policy=Cautious())
    report = doctor(tied, model=net)
    assert "embeddings: embed.weight = head.weight; " in text_of(report, "masks_others")
    assert codes(report, "mend") == []


def test_groups_that_no_kernel_steps() -> None:
    (found,) = cautions.of_kernels(
        [], [("param_groups[0]", "reference (plain torch), because the parameter is float64")]
    )
    assert found.code == "no_kernels"
    assert found.level == "advice"
    assert list(cautions.of_kernels([], [("param_groups[0]", "Triton")])) == []


@pytest.mark.gpu
def test_on_a_gpu_the_graph_and_the_times_are_said() -> None:
    net = model().cuda()
    report = doctor(for_model(net, policy="mgup"), model=net)
    assert report.findings == []
    assert report.devices == ["cuda:0"]
    assert report.groups[0].facts["kernels"] == ["Triton"]
    assert report.steps.graph is True
    assert report.steps.device_ms is not None
    assert len(report.steps.device_ms) == len(report.steps.host_ms) == 3
    double = doctor(for_model(model(torch.float64).cuda()))
    assert "float64" in text_of(double, "no_kernels")
    assert double.steps.graph is False
