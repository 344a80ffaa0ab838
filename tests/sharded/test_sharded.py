"""Sharded parameters over gloo: the cases of tests/support/sharded_cases_*.py, run on four processes together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from selective import SelectiveUpdate

RunCases = Callable[..., None]  # conftest.py

FAST = {
    "selection": (
        "every_policy", "other_bases", "delta_capture", "kernels_of_whole_tensors", "what_one_rank_notes",
        "not_finite", "other_dtypes", "samples", "massive_ties", "local_scope_differs",
    ),
    "own": (
        "own_code_is_the_same_bits", "state_is_cut_as_the_parameter", "what_is_gathered",
        "an_error_puts_parameters_back",
    ),
    "traffic": (
        "numbers_are_the_table", "bytes_of_a_tensor", "groups_and_meshes_share", "local_scope_sends_nothing",
        "another_collective_is_noticed",
    ),
    "training": (
        "one_policy_everywhere", "local_scope_goes_elsewhere", "replicas_stay_together", "beside_what_is_ignored",
    ),
    "checkpoints": (
        "resharded_in_a_run", "full_state_goes_both_ways", "state_dict_of_torch", "state_made_early",
        "read_before_the_first_step", "zero_redundancy",
    ),
    "chained": (
        "trains_as_on_one_device", "goes_on_from_a_flattened_checkpoint", "members_share_their_collectives",
        "skipped_by_all_members_on_all_ranks",
    ),
    "agreement": (
        "skipped_by_all", "learning_rate_zero", "partial_gradients_are_summed", "preconditioners_leave_shards_alone",
        "refused_where_it_is_wrapped",
    ),
    "decay": ("decays_as_one_device",),
    "norms": (
        "turns_as_on_one_device", "rotated_ones_keep_their_norm", "replicas_have_the_same_bits",
        "a_shard_s_own_norm_sends_nothing", "zeros_are_refused_on_all_ranks",
    ),
}  # fmt: skip
ROTATION = (
    "from_a_stored_basis", "from_its_own_bases", "parts_that_are_not_summed_differ", "the_same_bits_on_all_ranks",
    "what_is_sent", "taking_turns", "not_finite_on_one_rank", "saved_between_refreshes", "what_is_left_alone",
    "saved_by_torch", "low_precision", "thin_matrices_lose_the_same_side_everywhere",
)  # fmt: skip
GATHERED = (
    "other_sides_are_gathered", "gathering_is_said_and_counted", "nan_in_one_rank_s_part",
    "a_failing_refresh_ends_the_step_everywhere", "a_refresh_sends_what_is_rotated",
)  # fmt: skip
STACKS = (
    "as_matrix_by_matrix", "in_many_rounds", "a_sum_over_the_ranks_can_not_overflow", "experts_of_some_ranks",
    "one_shape_cut_in_two_ways", "other_local_tensors_are_noticed", "without_looking_they_are_not_noticed",
    "buffers_have_memory_in_a_step_alone",
)  # fmt: skip
SLOW = {
    "rotated, a small Llama": "rotation:the_loss_of_a_small_llama",
    "rotated, everywhere": "rotation:from_a_stored_basis_everywhere",
    "rotated by its own bases, everywhere": "rotation:from_its_own_bases_everywhere",
    "rotated in stacks, everywhere": "stacks:as_matrix_by_matrix_everywhere",
    "gathered, everywhere": "rotation:other_sides_are_gathered_everywhere",
    "resharded, every configuration": "checkpoints:resharded_in_every_run",
    "full state, every configuration": "checkpoints:full_state_of_every_run",
    "given gradients": "selection:every_policy_and_base",
    "other bases and dtypes, everywhere": "selection:everything_everywhere",
    "selective decay, everywhere": "decay:decays_as_one_device_everywhere",
    "norm control, everywhere": "norms:turns_as_on_one_device_everywhere",
    "own code, everywhere": "own:own_code_in_every_layout",
    "Triton's kernels": "selection:triton_kernels",
    "Triton's kernels, everywhere": "selection:triton_kernels_everywhere",
    "a small Llama, AdamW": "training:every_policy_over_adamw",
    "a small Llama, SGD": "training:every_policy_over_sgd",
    "a small Llama, Lion": "training:every_policy_over_lion",
}


@pytest.mark.timeout(600)  # less than a minute on two idle cores
def test_every_layout_does_what_one_device_does(run_cases: RunCases, tmp_path: Path) -> None:
    run_cases([f"sharded_cases_{part}:{name}" for part, names in FAST.items() for name in names], 4, tmp_path, 580)


def test_rotations_do_what_they_do_on_one_device(run_cases: RunCases, tmp_path: Path) -> None:
    decay = "sharded_cases_decay:rotated_parameters_decay_as_on_one_device"
    run_cases([*(f"sharded_cases_rotation:{name}" for name in ROTATION), decay], 4, tmp_path)


def test_other_sides_do_what_they_do_on_one_device(run_cases: RunCases, tmp_path: Path) -> None:
    run_cases([f"sharded_cases_rotation:{name}" for name in GATHERED], 4, tmp_path)


def test_rotations_in_stacks_do_what_they_do_matrix_by_matrix(run_cases: RunCases, tmp_path: Path) -> None:
    run_cases([f"sharded_cases_stacks:{name}" for name in STACKS], 4, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW.keys())
def test_every_policy_over_every_base(case: str, run_cases: RunCases, tmp_path: Path) -> None:
    run_cases([f"sharded_cases_{case}"], 4, tmp_path, 2900)


def test_an_unknown_scope_is_refused() -> None:
    base = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="scope is 'all', must be 'global' or 'local'"):
        SelectiveUpdate(base, scope="all")  # type: ignore[arg-type]


def test_a_failing_case_is_noticed(run_cases: RunCases, tmp_path: Path) -> None:
    """The twin: what one rank alone finds wrong comes back, and nobody is waited for."""
    with pytest.raises(AssertionError, match="rank 1, sharded_cases_world:fails_on_one_rank"):
        run_cases(["sharded_cases_world:fails_on_one_rank"], 2, tmp_path)


def test_a_set_that_does_not_end_is_killed_and_the_next_one_runs(run_cases: RunCases, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"'sharded_cases_world:waits'.* have not ended after 2 s"):
        run_cases(["sharded_cases_world:waits"], 2, tmp_path, 2)
    run_cases(["sharded_cases_world:does_nothing"], 2, tmp_path)


def test_a_rank_that_dies_ends_the_run(run_cases: RunCases, tmp_path: Path) -> None:
    """The others get torch's own error, and the run goes on from its checkpoint to where it would have ended."""
    with pytest.raises(AssertionError, match=r"Connection|timed out|reset|closed"):
        run_cases(["sharded_cases_world:dies_in_a_step"], 2, tmp_path)
    run_cases(["sharded_cases_world:goes_on_from_the_checkpoint"], 2, tmp_path)
