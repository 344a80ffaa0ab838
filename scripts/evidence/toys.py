"""Toy tasks: each task of `tasks.py` with a model of a few thousand parameters, on data that is made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evidence.classify import SubjectTask
from evidence.foldoc import Entries
from evidence.mae import Shape
from evidence.pictures import Pictures
from evidence.reconstruct import PictureTask
from evidence.tasks import TASKS, TextTask
from evidence.tokens import Tokens
from selective.compare.config import ModelConfig

WIDTH, HIDDEN, WORDS, LENGTH = 64, 16, 20, 6  # of the toy BERT: it has two heads
TINY = ModelConfig(layers=1, width=8, heads=2, context=8)
TINY_MAE = Shape(size=8, patch=2, width=12, layers=1, heads=1, decoder_width=8, decoder_layers=1)


def toy_text() -> TextTask:
    """A LLaMA-style model on random tokens."""
    numbers = torch.randint(0, 30, (600,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tokens = Tokens(numbers[:500], numbers[500:], {"vocabulary": 32})
    return TextTask(tokens, TINY, batch_size=4, micro_batch=2, evaluate_windows=6, name="toy text")


def bert_weights() -> dict[str, Tensor]:
    """Random weights of a `BertModel` with two layers, by its names."""
    generator = torch.Generator().manual_seed(0)
    names = {"embeddings.word_embeddings": (WORDS, WIDTH), "embeddings.position_embeddings": (LENGTH, WIDTH),
             "embeddings.token_type_embeddings": (2, WIDTH), "embeddings.LayerNorm": (WIDTH,)}  # fmt: skip
    for layer in (0, 1):
        names |= {f"encoder.layer.{layer}.{name}": shape for name, shape in {
            **{f"attention.self.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")},
            "attention.output.dense": (WIDTH, WIDTH), "attention.output.LayerNorm": (WIDTH,),
            "intermediate.dense": (HIDDEN, WIDTH), "output.dense": (WIDTH, HIDDEN), "output.LayerNorm": (WIDTH,),
        }.items()}  # fmt: skip
    made = {f"{name}.weight": 0.3 * torch.randn(shape, generator=generator) for name, shape in names.items()}
    biased = {name: shape for name, shape in names.items() if "_embeddings" not in name}
    return made | {f"{name}.bias": 0.3 * torch.randn(shape[0], generator=generator) for name, shape in biased.items()}


def toy_entries() -> Entries:
    """Texts of one to five tokens. The class is that of the first token."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, WORDS, (60, LENGTH), generator=generator)
    tokens[torch.arange(LENGTH) > torch.randint(1, LENGTH, (60, 1), generator=generator)] = 0
    held_out = torch.arange(60) % 5 == 0
    return Entries(tokens, tokens[:, 0] % 3, held_out, bert_weights(), {"subjects": ["a", "b", "c"]})


def toy_subjects() -> SubjectTask:
    """A BERT of two layers on the toy entries."""
    return SubjectTask(toy_entries(), batch_size=8, name="toy entries")


def toy_pictures() -> Pictures:
    """Slopes of random directions."""
    generator = torch.Generator().manual_seed(2)
    slopes = torch.randn(40, 3, 2, generator=generator)
    place = torch.linspace(-1, 1, TINY_MAE.size)
    heights = slopes[:, :, :1, None] * place[:, None] + slopes[:, :, 1:, None] * place
    pixels = (127.5 * (1 + heights.tanh())).to(torch.uint8)
    return Pictures(pixels[:32], pixels[32:], {"pictures": "toy"})


def toy_mae() -> PictureTask:
    """A masked autoencoder of one layer on the toy pictures."""
    return PictureTask(toy_pictures(), TINY_MAE, batch_size=8, evaluated=8, name="toy pictures")


_KINDS: dict[str, Callable[[], Any]] = {"foldoc-minilm": toy_subjects, "pictures-mae": toy_mae}
TOYS: dict[str, Callable[[], Any]] = {name: _KINDS.get(name, toy_text) for name in TASKS}
