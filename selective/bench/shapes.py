"""The sets of parameter shapes on which steps are timed."""

from __future__ import annotations

Shape = tuple[int, ...]


def _transformer(vocabulary: int, width: int, layers: int, positions: int, biases: bool) -> list[Shape]:
    shapes: list[Shape] = [(vocabulary, width)]
    if positions:
        shapes.append((positions, width))
    for _ in range(layers):
        matrices = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        for rows, columns in matrices:
            shapes.append((rows, columns))
            if biases:
                shapes.append((columns,))
        shapes += [(width,)] * (4 if biases else 2)  # norms
    return shapes + [(width,)] * (2 if biases else 1)


def _llama(vocabulary: int, width: int, layers: int, mlp: int, key_value: int) -> list[Shape]:
    """A Llama without biases. A layer has q, k, v, o, gate, up, down and two norms; the head is not tied."""
    square, key, wide = (width, width), (key_value, width), (mlp, width)
    layer: list[Shape] = [square, key, key, square, wide, wide, (width, mlp), (width,), (width,)]
    return [(vocabulary, width), *layer * layers, (width,), (vocabulary, width)]


def _many_small() -> list[Shape]:
    """1,000 tensors of 64 to 4,096 elements, vectors and matrices in turn."""
    sizes = [64, 96, 256, 781, 1024, 1823, 2048, 4096]
    return [(n,) if i % 2 or n % 32 else (32, n // 32) for i in range(1000) for n in (sizes[i % len(sizes)],)]


def _conv() -> list[Shape]:
    """The weights of a ResNet-50: bottlenecks of 1×1, 3×3 and 1×1 convolutions with their norms, and the head."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for narrow, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        wide = 4 * narrow
        for block in range(blocks):
            convolutions = [(narrow, before, 1, 1), (narrow, narrow, 3, 3), (wide, narrow, 1, 1)]
            if block == 0:
                convolutions.append((wide, before, 1, 1))
            for shape in convolutions:
                shapes += [shape, (shape[0],), (shape[0],)]
            before = wide
    return shapes + [(1000, before), (1000,)]


# The shapes of each model's parameters, by the model's name.
SHAPES: dict[str, list[Shape]] = {
    "transformer-30m": _transformer(8192, 512, 8, 0, False),  # 29.4M
    "gpt2": _transformer(50257, 768, 12, 1024, True),  # 124M
    "many-small": _many_small(),
    "conv": _conv(),  # 25.6M
    "llama-60m": _llama(32_000, 512, 8, 1376, 512),  # 58.1M
    "llama-1b": _llama(32_000, 2048, 22, 5632, 256),  # 1.10B: for a GPU
}
