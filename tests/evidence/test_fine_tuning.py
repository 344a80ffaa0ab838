"""The fine-tuning task of scripts/evidence, of a BERT and a dictionary that are made up."""

from __future__ import annotations

import pytest
import torch
from evidence.bert import pretrained
from evidence.classify import SubjectTask
from evidence.foldoc import Entries, is_held_out, subjects_of
from evidence.runs import Run
from evidence.setups import optimizer_of
from evidence.training import Trainer
from torch import Tensor

WIDTH, HIDDEN, WORDS, LENGTH = 64, 16, 20, 6  # two heads
DICTIONARY = """alpha

   <language, history> An old one.

beta

   <language> A new one.

gamma

   <tool> No language.

delta

   No subject at all.
"""


def weights() -> dict[str, Tensor]:
    """Of a `BertModel` with two layers, by its names."""
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
    biased = {name: shape for name, shape in names.items() if "embeddings.w" not in name and "_embeddings" not in name}
    return made | {f"{name}.bias": 0.3 * torch.randn(shape[0], generator=generator) for name, shape in biased.items()}


def entries() -> Entries:
    """Texts of one to five tokens; the class is that of the first token."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, WORDS, (60, LENGTH), generator=generator)
    tokens[torch.arange(LENGTH) > torch.randint(1, LENGTH, (60, 1), generator=generator)] = 0
    return Entries(tokens, tokens[:, 0] % 3, torch.arange(60) % 5 == 0, weights(), {"subjects": ["a", "b", "c"]})


def test_subjects_of_a_dictionary() -> None:
    texts, classes, names = subjects_of(DICTIONARY, 2)
    assert names == ["language", "tool"]
    assert classes == [0, 0, 1]
    assert texts[0].split() == "alpha An old one.".split()
    assert not any("<" in text for text in texts)
    words = [f"word {number}" for number in range(1000)]
    assert 60 < sum(map(is_held_out, words)) < 140
    assert all(is_held_out(word) == is_held_out(f"{word.upper()}\n\n   another meaning") for word in words[:50])


def test_padding_and_segments() -> None:
    model = pretrained(weights(), 3, seed=0)
    texts = torch.tensor([[3, 7, 0, 0], [3, 7, 5, 0]])
    torch.testing.assert_close(model(texts[:1]), model(texts[:1, :2]))
    assert not torch.allclose(model(texts)[0], model(texts)[1])
    other = weights() | {"embeddings.token_type_embeddings.weight": torch.zeros(2, WIDTH)}
    assert not torch.allclose(pretrained(other, 3, seed=0)(texts), model(texts))
    assert not torch.equal(pretrained(weights(), 3, seed=1).head.weight, model.head.weight)


def test_the_task_is_learned_by_the_loop() -> None:
    task = SubjectTask(entries(), batch_size=8)
    record = Trainer(task, optimizer_of, 40, 20, "cpu").go(Run("toy", "Cautious on AdamW", 3e-3))
    assert record["validation"]["loss"][-1] < record["validation"]["loss"][0]
    assert record["validation"]["step"] == [0, 20, 40]
    first = torch.cat([task.batch(0, step)[0] for step in range(6)])
    assert len(first.unique(dim=0)) == len(task.train[0].unique(dim=0)), "an epoch has everyone once"
    assert not torch.equal(task.batch(0, 0)[0], task.batch(0, 6)[0])
    assert not torch.equal(task.batch(0, 0)[0], task.batch(1, 0)[0])
    held_out = {tuple(row.tolist()) for row in task.held_out[0]}
    assert not held_out & {tuple(row.tolist()) for row in first}
    kinds = [(group["name"], len(group["params"])) for group in optimizer_of(
        Run("toy", "Cautious on AdamW", 1e-3), task.model(0), 1
    ).param_groups]  # fmt: skip
    assert dict(kinds)["matrices"] == 2 * 6
    assert dict(kinds)["head"] == 1


@pytest.mark.slow
def test_states_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict(weights(), strict=False)
    tokens = torch.tensor([[3, 7, 5, 0, 0], [3, 7, 5, 9, 1]])
    wanted = theirs(tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    real = tokens != 0
    torch.testing.assert_close(pretrained(weights(), 3, 0).states(tokens)[real], wanted[real], rtol=1e-4, atol=1e-5)
