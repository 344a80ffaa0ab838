"""The fine-tuning task of scripts/evidence, of a BERT and a dictionary that are made up."""

from __future__ import annotations

import pytest
import torch
from evidence.bert import pretrained
from evidence.foldoc import is_held_out, subjects_of
from evidence.runs import Run
from evidence.setups import optimizer_of
from evidence.toys import HIDDEN, LENGTH, WIDTH, WORDS, bert_weights, toy_subjects
from evidence.training import Trainer
from torch import nn

DICTIONARY = """alpha

   <language, history> An old one.

beta

   <language> A new one.

gamma

   <tool> No language.

delta

   No subject at all.
"""


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
    model = pretrained(bert_weights(), 3, seed=0)
    texts = torch.tensor([[3, 7, 0, 0], [3, 7, 5, 0]])
    torch.testing.assert_close(model(texts[:1]), model(texts[:1, :2]))
    assert not torch.allclose(model(texts)[0], model(texts)[1])
    other = bert_weights() | {"embeddings.token_type_embeddings.weight": torch.zeros(2, WIDTH)}
    assert not torch.allclose(pretrained(other, 3, seed=0)(texts), model(texts))
    assert not torch.equal(pretrained(bert_weights(), 3, seed=1).head.weight, model.head.weight)


def test_the_task_is_learned_by_the_loop() -> None:
    task = toy_subjects()
    record = Trainer(task, optimizer_of, 40, 20, "cpu").go(Run("toy", "Cautious on AdamW", 3e-3))
    assert record["validation"]["loss"][-1] < record["validation"]["loss"][0]
    assert record["validation"]["step"] == [0, 20, 40]
    assert record["measures"]["accuracy"] > 0.5, "chance is a third"
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


def test_accuracy_is_the_share_of_right_answers() -> None:
    class Constant(nn.Module):
        """Answers with the same class, whatever the text."""

        def __init__(self, answer: int) -> None:
            super().__init__()
            self.logits = nn.Parameter(nn.functional.one_hot(torch.tensor(answer), 3).float())

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(len(tokens), -1)

    task = toy_subjects()
    classes = task.held_out[1]
    for answer in range(3):
        share = (classes == answer).double().mean().item()
        assert task.measures(Constant(answer)) == {"accuracy": pytest.approx(share)}
    assert sum(task.measures(Constant(answer))["accuracy"] for answer in range(3)) == pytest.approx(1)


@pytest.mark.slow
def test_states_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict(bert_weights(), strict=False)
    tokens = torch.tensor([[3, 7, 5, 0, 0], [3, 7, 5, 9, 1]])
    wanted = theirs(tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    real = tokens != 0
    torch.testing.assert_close(
        pretrained(bert_weights(), 3, 0).states(tokens)[real], wanted[real], rtol=1e-4, atol=1e-5
    )
