"""LoRA adapters, by their names: small matrices, wherever in the model they are."""

from __future__ import annotations

import re

from selective.param_groups.joined_weights import NamedParameter

_ADAPTER = re.compile(r"lora_\w+")  # lora_A, lora_B, lora_embedding_A (peft); lora_up, lora_down (diffusers)


def is_adapter(parameter: NamedParameter) -> bool:
    """True if a part of the parameter's name is that of a LoRA adapter."""
    return any(_ADAPTER.fullmatch(part) for name in parameter.names for part in name.split("."))
