"""trl's trainers with a small Llama: supervised fine-tuning and DPO, held against the gradients that they made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optional import missing
from stack_loops import CASES, LR, assert_same, differences, plain

from selective import SelectiveUpdate

if missing(["trl", "datasets", "transformers", "accelerate"]):
    pytest.skip("needs trl", allow_module_level=True)
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
# theirs: of what is going to change in later versions
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

WORDS = [f"w{number}" for number in range(30)]


def llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate([*WORDS, "<pad>", "<eos>"])}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def rows(kind: str) -> Any:
    from datasets import Dataset

    if kind == "sft":
        drawn = torch.randint(0, 30, (16, 8), generator=torch.Generator().manual_seed(1))
        return Dataset.from_dict({"input_ids": drawn.tolist()})
    texts = [" ".join(WORDS[number : number + 3]) for number in range(16)]
    return Dataset.from_dict({"prompt": texts, "chosen": texts[5:] + texts[:5], "rejected": texts[9:] + texts[:9]})


class Recorder(transformers.TrainerCallback):
    """Keeps what the optimizer is handed: gradients and rates."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[float], list[torch.Tensor | None]]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        self.steps.append((rates, [None if p.grad is None else p.grad.clone() for p in model.parameters()]))


def run(
    kind: str, case: str, folder: Path, as_class: bool = False, resume: str | None = None
) -> tuple[Any, SelectiveUpdate, Recorder]:
    """Four steps of fine-tuning or DPO, saved after the second."""
    model, recorder, options = llama(), Recorder(), {}
    if as_class:
        bound = SelectiveUpdate.bind(torch.optim.AdamW, **CASES[case])
        options["optimizer_cls_and_kwargs"] = bound, {"lr": LR}
    else:
        options["optimizers"] = wrapped(model, case), None
    if kind == "dpo":
        options["ref_model"] = llama()
    arguments = getattr(trl, f"{kind.upper()}Config")(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=LR, report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        save_strategy="steps", save_steps=2, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind.upper()}Trainer")(
        model=model,
        args=arguments,
        train_dataset=rows(kind),
        processing_class=tokenizer(),
        callbacks=[recorder],
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, plain(trainer.optimizer), recorder


def wrapped(model: Any, case: str) -> SelectiveUpdate:
    return SelectiveUpdate(torch.optim.AdamW(model.parameters(), lr=LR), **CASES[case])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("case", ["dense", "mgup", "random-soap"])
def test_steps_are_those_by_hand_on_its_gradients(kind: str, case: str, tmp_path: Path) -> None:
    model, optimizer, recorder = run(kind, case, tmp_path)
    twin = llama()
    by_hand = wrapped(twin, case)
    for rates, gradients in recorder.steps:
        for p, gradient in zip(twin.parameters(), gradients, strict=True):
            p.grad = gradient
        for group, rate in zip(by_hand.param_groups, rates, strict=True):
            group["lr"] = rate
        by_hand.step()
    assert len(recorder.steps) == 4 == optimizer.count.steps
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


# DPOTrainer does not take a class
@pytest.mark.parametrize("kind,as_class", [("sft", False), ("sft", True), ("dpo", False)])
def test_a_checkpoint_goes_on_bit_for_bit(kind: str, as_class: bool, tmp_path: Path) -> None:
    whole = run(kind, "random-soap", tmp_path, as_class)[:2]
    at_2 = str(tmp_path / "checkpoint-2")
    assert_same(run(kind, "random-soap", tmp_path / "again", as_class, at_2)[:2], whole)
    assert differences(run(kind, "soap", tmp_path / "other", as_class)[:2], whole)
