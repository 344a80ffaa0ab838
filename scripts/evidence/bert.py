"""A BERT in plain torch that classifies texts by the mean of its last states, and the weights that it begins with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evidence.attention import Attention

PAD = 0  # the token that is no part of a text


class Layer(nn.Module):
    """Attention and a perceptron, each with its norm behind the sum, as in BERT."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.attention_norm, self.norm = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, real[:, None, None, :]))
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


class Classifier(nn.Module):
    """BERT's encoder, the mean of its states over the tokens of a text, and a linear head. There is no dropout.

    `forward` takes tokens, int64 (texts, length), and returns logits (texts, classes).
    """

    def __init__(self, vocabulary: int, length: int, width: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(width, hidden, max(1, width // 32)) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def states(self, tokens: Tensor) -> Tensor:
        """The last states, (texts, length, width)."""
        real = tokens != PAD
        x = self.norm(self.words(tokens) + self.places.weight[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x, real)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        real = (tokens != PAD)[..., None]
        return self.head((self.states(tokens) * real).sum(1) / real.sum(1).clamp(min=1))


_NAMES = {
    **{f"attention.self.{name}": f"attention.{name}" for name in ("query", "key", "value")},
    "attention.output.dense": "attention.out", "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up", "output.dense": "down", "output.LayerNorm": "norm",
}  # fmt: skip


def pretrained(weights: Mapping[str, Tensor], classes: int, seed: int) -> Classifier:
    """The classifier with the weights of a `BertModel`, of any float dtype, and a head that the seed fixes.

    Texts have one segment, whose embedding is added to those of the places.
    """
    words = weights["embeddings.word_embeddings.weight"]
    places = weights["embeddings.position_embeddings.weight"]
    hidden = weights["encoder.layer.0.intermediate.dense.weight"].shape[0]
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(len(words), len(places), words.shape[1], hidden, layers, classes)
    state = {"words.weight": words, "places.weight": places + weights["embeddings.token_type_embeddings.weight"][0]}
    state |= {f"norm.{part}": weights[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")}
    for theirs, ours in _NAMES.items():
        for part in ("weight", "bias"):
            for number in range(layers):
                state[f"layers.{number}.{ours}.{part}"] = weights[f"encoder.layer.{number}.{theirs}.{part}"]
    state |= {f"head.{name}": p for name, p in model.head.state_dict().items()}
    model.load_state_dict(state)
    return model
