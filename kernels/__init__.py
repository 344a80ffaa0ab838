"""Everything that touches every element: the selective step, exact top-K, sums, counter-based random numbers.

This folder is installed as `selective.kernels`. The import name `kernels` belongs to Hugging Face's kernels.
"""

if __name__ != "selective.kernels":
    raise ModuleNotFoundError(
        f"imported as {__name__!r}: this folder is the package `selective.kernels`; "
        "the name `kernels` belongs to Hugging Face's kernels.",
        name="kernels",
    )
