"""The sets of parameter shapes on which steps are timed, and the kind of each parameter."""

from __future__ import annotations

Shape = tuple[int, ...]
Kinded = tuple[str, Shape]  # a kind of `param_groups_for`, and a parameter's shape


def _transformer(vocabulary: int, width: int, layers: int, positions: int, biases: bool) -> list[Kinded]:
    """Weights are stored as [in, out], with queries, keys and values side by side, as in GPT-2. The head is tied."""
    parameters: list[Kinded] = [("embeddings", (vocabulary, width))]
    if positions:
        parameters.append(("embeddings", (positions, width)))
    vector = ("vectors", (width,))
    for _ in range(layers):
        weights: list[Kinded] = [
            ("columns:3", (width, 3 * width)), ("matrices", (width, width)),
            ("matrices", (width, 4 * width)), ("matrices", (4 * width, width)),
        ]  # fmt: skip
        for kind, (rows, columns) in weights:
            parameters.append((kind, (rows, columns)))
            if biases:
                parameters.append(("vectors", (columns,)))
        parameters += [vector] * (4 if biases else 2)  # norms
    return parameters + [vector] * (2 if biases else 1)


def _llama(vocabulary: int, width: int, layers: int, mlp: int, key_value: int) -> list[Kinded]:
    """A Llama without biases. A layer has q, k, v, o, gate, up, down and two norms; the head is not tied."""
    square, key, wide = (width, width), (key_value, width), (mlp, width)
    matrices: list[Kinded] = [("matrices", shape) for shape in (square, key, key, square, wide, wide, (width, mlp))]
    vector: Kinded = ("vectors", (width,))
    layer = [*matrices, vector, vector]
    return [("embeddings", (vocabulary, width)), *layer * layers, vector, ("head", (vocabulary, width))]


def _many_small() -> list[Shape]:
    """1,000 tensors of 64 to 4,096 elements, vectors and matrices in turn."""
    sizes = [64, 96, 256, 781, 1024, 1823, 2048, 4096]
    return [(n,) if i % 2 or n % 32 else (32, n // 32) for i in range(1000) for n in (sizes[i % len(sizes)],)]


def _conv() -> list[Kinded]:
    """The weights of a ResNet-50: bottlenecks of 1×1, 3×3 and 1×1 convolutions with their norms, and the head."""
    parameters: list[Kinded] = [("conv", (64, 3, 7, 7)), ("vectors", (64,)), ("vectors", (64,))]
    before = 64
    for narrow, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        wide = 4 * narrow
        for block in range(blocks):
            convolutions = [(narrow, before, 1, 1), (narrow, narrow, 3, 3), (wide, narrow, 1, 1)]
            if block == 0:
                convolutions.append((wide, before, 1, 1))
            for shape in convolutions:
                parameters += [("conv", shape), ("vectors", (shape[0],)), ("vectors", (shape[0],))]
            before = wide
    return [*parameters, ("head", (1000, before)), ("vectors", (1000,))]


# The parameters of each model with their kinds, by the model's name.
MODELS: dict[str, list[Kinded]] = {
    "transformer-30m": _transformer(8192, 512, 8, 0, False),  # 29.4M
    "gpt2": _transformer(50257, 768, 12, 1024, True),  # 124M
    "conv": _conv(),  # 25.6M
    "llama-34m": _llama(8192, 512, 8, 1376, 512),  # 33.7M, the model of scripts/gain.py
    "llama-60m": _llama(32_000, 512, 8, 1376, 512),  # 58.1M
    "llama-110m": _llama(16_384, 768, 12, 2048, 768),  # 110M
    "llama-1b": _llama(32_000, 2048, 22, 5632, 256),  # 1.10B: for a GPU
}
# The shapes of each model's parameters, and of one set that is no model.
SHAPES: dict[str, list[Shape]] = {name: [shape for _, shape in parameters] for name, parameters in MODELS.items()}
SHAPES["many-small"] = _many_small()
