"""The functions that touch every element: the selective step, exact top-K, sums, counter-based random numbers.

This folder is installed as `selective.kernels`. The import name `kernels` belongs to Hugging Face's kernels. In a shell
at the root of a clone that name leads here first: then the installed package of that name takes this module's place, or
this module stays empty.
"""

if __name__ == "kernels":
    from ._stand_aside import stand_aside

    stand_aside(__name__)
elif __name__ != "selective.kernels":
    raise ModuleNotFoundError(
        f"imported as {__name__!r}: this folder is the package `selective.kernels`", name=__name__
    )
else:
    from ._dispatch import (
        Backend,
        advance,
        apply_mask,
        backend_in_use,
        begin_sharded,
        selective_step,
        top_k,
        use_backend,
        why_no_function,
        why_own_code,
        why_reference,
    )
    from ._functions import evaluate_function, function_device
    from ._together import CheckedCalls, check_steps, selective_steps
    from .checked import KernelDifference, checked_steps
    from .matrices import hold_matrices_, norm_sums, turn_matrices_
    from .newton_schulz import newton_schulz_
    from .products import average_grams_, float32_product, has_float32_products
    from .reference.decay import decaying, drawn_like
    from .reference.matrices import turned_matrices
    from .reference.random import sample_positions, uniform, uniform_bits
    from .reference.rules import Advanced, as_seen, decay_factor, turned
    from .shard import Shard
    from .sharded import Exchange, RunningPart
    from .spec import (
        AdamRule,
        Control,
        Decay,
        Draw,
        GivenRule,
        Item,
        ItemList,
        LionRule,
        Matrices,
        Rule,
        Scalar,
        Selection,
        SGDRule,
        StepCall,
        StepSpec,
        Strength,
        Sums,
        SumsTable,
    )

    __all__ = [
        "AdamRule",
        "Advanced",
        "Backend",
        "CheckedCalls",
        "Control",
        "Decay",
        "Draw",
        "Exchange",
        "GivenRule",
        "Item",
        "ItemList",
        "KernelDifference",
        "LionRule",
        "Matrices",
        "Rule",
        "RunningPart",
        "SGDRule",
        "Scalar",
        "Selection",
        "Shard",
        "StepCall",
        "StepSpec",
        "Strength",
        "Sums",
        "SumsTable",
        "advance",
        "apply_mask",
        "as_seen",
        "average_grams_",
        "backend_in_use",
        "begin_sharded",
        "check_steps",
        "checked_steps",
        "decay_factor",
        "decaying",
        "drawn_like",
        "evaluate_function",
        "float32_product",
        "function_device",
        "has_float32_products",
        "hold_matrices_",
        "newton_schulz_",
        "norm_sums",
        "sample_positions",
        "selective_step",
        "selective_steps",
        "top_k",
        "turn_matrices_",
        "turned",
        "turned_matrices",
        "uniform",
        "uniform_bits",
        "use_backend",
        "why_no_function",
        "why_own_code",
        "why_reference",
    ]
