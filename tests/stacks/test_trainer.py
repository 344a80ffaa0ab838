"""Hugging Face's `Trainer` with a small Llama: an instance, a class with keyword arguments, a resume; no logging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optional import missing
from stack_loops import CASES, LR, assert_same, differences

from selective import SelectiveUpdate

if missing(["transformers", "accelerate"]):
    pytest.skip("needs transformers and accelerate", allow_module_level=True)
transformers = pytest.importorskip("transformers")

BATCH, TOKENS, WORDS = 2, 8, 32


def llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)


def texts() -> list[dict[str, Any]]:
    words = torch.randint(0, WORDS, (16, TOKENS), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row.clone()} for row in words]


class InOrder(transformers.Trainer):
    """Without shuffling, so that the plain loop sees the same batches."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def run(
    case: str, folder: Path, as_class: bool, steps: int = 6, save: int | None = None, resume: Any = None, **more: Any
) -> tuple[Any, Any]:
    model = llama()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH, report_to=[], use_cpu=True,
        learning_rate=LR, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=2, disable_tqdm=True,
        logging_strategy="no", dataloader_pin_memory=False,
        save_strategy="no" if save is None else "steps", save_steps=save or 500, **{"max_grad_norm": 1.0, **more},
    )  # fmt: skip
    options: dict[str, Any] = {}
    if as_class:
        bound = SelectiveUpdate.bind(torch.optim.AdamW, **CASES[case])
        options["optimizer_cls_and_kwargs"] = bound, {"lr": LR}
    else:
        options["optimizers"] = instance(model, case), None
    trainer = InOrder(model=model, args=arguments, train_dataset=texts(), **options)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer.optimizer


def instance(model: Any, case: str) -> SelectiveUpdate:
    """Groups as the Trainer makes them: no decay of vectors."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return SelectiveUpdate(torch.optim.AdamW(groups, lr=LR), **CASES[case])


def by_hand(case: str, steps: int = 6, clip: float = 1.0) -> tuple[Any, Any]:
    model = llama()
    optimizer = instance(model, case)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, steps)
    rows = texts()
    for step in range(steps):
        words = torch.stack([row["input_ids"] for row in rows[step * BATCH : (step + 1) * BATCH]])
        count = torch.tensor(BATCH * (TOKENS - 1))  # as the Trainer does: the sum over tokens, then divided
        model(input_ids=words, labels=words, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer


def cases_and_forms(begin_with_class: bool) -> list[Any]:
    """Every case as an instance and as a class; half of them in turns, the other half in the slow lane."""
    return [
        pytest.param(
            case, as_class, id=f"{case}-{'class' if as_class else 'instance'}",
            marks=[] if as_class == (begin_with_class != bool(place % 2)) else pytest.mark.slow,
        )
        for place, case in enumerate(CASES) for as_class in (False, True)
    ]  # fmt: skip


@pytest.mark.parametrize(("case", "as_class"), cases_and_forms(begin_with_class=True))
def test_steps_are_those_of_the_plain_loop(case: str, as_class: bool, tmp_path: Path) -> None:
    found = run(case, tmp_path, as_class)
    assert_same(found, by_hand(case))
    assert differences(found, by_hand(case, clip=0.01))


@pytest.mark.parametrize(("case", "as_class"), cases_and_forms(begin_with_class=False))
def test_a_checkpoint_goes_on_bit_for_bit(case: str, as_class: bool, tmp_path: Path) -> None:
    whole = run(case, tmp_path, as_class, save=3)
    assert {path.name for path in tmp_path.iterdir()} >= {"checkpoint-3", "checkpoint-6"}
    resumed = run(case, tmp_path / "again", as_class, save=3, resume=str(tmp_path / "checkpoint-3"))
    assert_same(resumed, whole)


def test_a_checkpoint_of_another_policy_is_refused_by_name(tmp_path: Path) -> None:
    run("mgup", tmp_path, True, save=3)
    with pytest.raises(ValueError, match=r"has the policy RandomMask.* made with MGUP"):
        run("random", tmp_path / "again", True, resume=str(tmp_path / "checkpoint-3"))


def test_accumulation(tmp_path: Path) -> None:
    whole = run("random-soap", tmp_path, True, steps=4, gradient_accumulation_steps=2)
    again = run("random-soap", tmp_path, False, steps=4, gradient_accumulation_steps=2)
    assert_same(whole, again)
    assert differences(whole, run("random-soap", tmp_path, True, steps=4))
