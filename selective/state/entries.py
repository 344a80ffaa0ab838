"""Names and encoding of the wrapper's entries, and the split of a checkpoint into the base's part and ours.

Note [our state entries]: everything of ours is a tensor under `PREFIX` in a parameter's state, beside the base's
entries in `SelectiveUpdate.state` and `state_dict()["state"]` but never in the base's own dictionaries (optimizers test
`len(state) == 0`). The step count, the seed and the policy stand in each parameter's state and not in the groups: the
flattened form of torch.distributed.checkpoint takes tensors and numbers in a state but only keys that live groups have.
The names of the base's class stand behind the policy, in its padding: checkpoints that were made before there were any
would not have an entry of their own, and torch.distributed.checkpoint refuses to read one that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from selective.base.mismatch import CheckpointMismatch
from selective.configured import Configured

C = TypeVar("C", bound=Configured)
Refusal = Callable[[str], ValueError]
"""Builds the exception from a clause that says what is wrong: one ending for checkpoints, another for writes."""

PREFIX = "selective/"
POLICY_STATE = PREFIX + "state/"
STEP, SEED, POLICY, MOMENTUM, RESIDUE = (PREFIX + name for name in ("step", "seed", "policy", "momentum", "residue"))
DECAY = PREFIX + "decay"  # of a group whose decay is selective
NORM = PREFIX + "norm"  # of a group whose norms are kept
BASIS = PREFIX + "basis/"  # what a preconditioner keeps of a parameter ...
# ... which one it is, as what the parameter is rotated, how many steps it took so, how many gradients were left out
PRECONDITIONER, BASIS_SHAPE = PREFIX + "preconditioner", PREFIX + "basis_shape"
BASIS_STEPS, BASIS_SKIPPED = PREFIX + "basis_steps", PREFIX + "basis_skipped"
_BLOCK = 512  # policies are padded to a multiple: loading in place needs the same size when a hyper-parameter changed


def encode_model(model: Configured, note: str = "") -> Tensor:
    """A model, such as a policy, as JSON bytes (uint8), padded with zeros; a note in the padding, if it fits."""
    data, mark = model.to_saved().encode(), b"\0" + note.encode()
    size = len(data) + -len(data) % _BLOCK
    if note and len(data) + len(mark) <= size:
        data += mark
    return torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8).clone()


def decode_model(data: Tensor, family: type[C], where: str, refuse: Refusal = CheckpointMismatch) -> C:
    """The model that `encode_model` wrote; the error that `refuse` makes, with the place, if the bytes are not one."""
    try:
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise ValueError(f"found {data.dtype} of shape {tuple(data.shape)}, expected bytes")
        text, note = _text_and_note(data)
        if note != note.strip() or "\0" in note:
            raise ValueError("what follows it is no note of ours")
        model = family.from_saved(text)
    except (UnicodeDecodeError, ValueError, TypeError) as error:
        what = family._family
        raise refuse(f"{where}: the saved {what} can't be read: {error}") from error
    model.as_if_written()  # every field was saved, so that a changed default can't change a run
    return model


def decode_note(data: Tensor) -> str:
    """The note beside a model that `decode_model` can read; empty where there is none."""
    return _text_and_note(data)[1]


def _text_and_note(data: Tensor) -> tuple[str, str]:
    text, _, note = bytes(data.cpu().tolist()).partition(b"\0")
    return text.decode(), note.rstrip(b"\0").decode()


def base_part(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of `SelectiveUpdate` without anything of ours: what the plain base loads. Tensors are shared."""
    state = {
        index: {key: value for key, value in entries.items() if not str(key).startswith(PREFIX)}
        for index, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": {index: entries for index, entries in state.items() if entries}}


def own_part(state_dict: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """Our entries of a checkpoint, by parameter; parameters without any are left out."""
    found: dict[Any, dict[str, Any]] = {}
    for index, entries in state_dict["state"].items():
        ours = {key: value for key, value in entries.items() if str(key).startswith(PREFIX)}
        # an empty dictionary is what reading a flattened checkpoint makes of an entry that it does not have
        ours = {key: value for key, value in ours.items() if not (isinstance(value, dict) and not value)}
        if ours:
            found[index] = ours
    return found


def restore_dtypes(loaded: MutableMapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Undo the cast of torch's load_state_dict: every tensor of a state gets the dtype it was saved with.

    torch casts floating *and integer* state to the dtype of a floating parameter (1001 becomes 1000 in bfloat16).
    """
    for key, value in saved.items():
        now = loaded.get(key)
        if isinstance(value, Tensor) and isinstance(now, Tensor) and type(value) is type(now):
            if now.dtype != value.dtype:
                loaded[key] = value.detach().clone().to(now.device)
        elif isinstance(value, Mapping) and isinstance(now, MutableMapping):
            restore_dtypes(now, value)
