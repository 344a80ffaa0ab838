"""The words that people search for, and the page that answers each.

The site's search ranks a page first if it has an index entry of the word (Sphinx scores titles and text far lower). So
each word becomes an index entry of its page, or of a section of it, when the site is built. An entry lists words that
somebody types, not words that a page happens to contain.
"""

from __future__ import annotations

import re

KEYWORDS = {
    "guides/install": ["install", "installation", "pip", "requirements"],
    "guides/install#on-an-nvidia-gpu": ["triton", "cuda", "gpu"],
    "guides/quick-start": ["tutorial", "getting started", "tour", "for_model"],
    "guides/worth-it": ["does it help", "worth it", "benchmark my model"],
    "guides/faq": ["faq", "questions", "problems"],
    "guides/faq#which-learning-rate": ["learning rate", "lr"],
    "guides/faq#how-much-memory-does-it-take": ["memory"],
    "guides/coming-from": ["timm", "heavyball", "pytorch_optimizer", "c-optim", "migrate"],
    "guides/pretraining": ["pretraining", "from scratch"],
    "guides/fine-tuning": ["lora", "peft", "adapters", "fine-tuning", "finetune"],
    "guides/muon": ["muon", "chainedoptimizer", "two optimizers"],
    "guides/choose-a-policy": ["which policy", "mask", "control"],
    "guides/write-a-policy": ["custom policy", "own policy"],
    "guides/rotate": ["rotate", "soap", "shampoo", "adadiag", "preconditioner"],
    "guides/decay": ["weight decay", "decay"],
    "guides/norm-control": ["norm control", "hyperball", "keep norms"],
    "guides/stacks": ["lightning", "accelerate", "gradscaler", "deepspeed", "trl"],
    "guides/stacks#hugging-faces-trainer": ["trainer", "hugging face"],
    "guides/stacks#low-precision": ["bfloat16", "8-bit"],
    "guides/distributed": ["ddp", "fsdp1"],
    "guides/sharded": ["fsdp", "fsdp2", "tensor parallelism", "sharded"],
    "guides/checkpoints": ["checkpoint", "resume", "save"],
    "guides/watching": ["logging", "tensorboard", "wandb", "statistics"],
    "guides/compare": ["compare", "sweep", "seeds"],
    "guides/doctor": ["doctor", "diagnose", "check my optimizer"],
    "guides/examples": ["examples"],
    "performance#why-is-my-step-slow": ["slow", "slow step"],
    "performance": ["speed", "performance", "benchmark"],
    "evidence": ["evidence", "results", "does it work"],
}


def with_entries(name: str, text: str) -> str:
    """The Markdown of the page `name` with its index entries, each below the heading that it leads to.

    Raises:
        ValueError: a section that KEYWORDS names is not on the page.
    """
    for place, words in KEYWORDS.items():
        page, _, anchor = place.partition("#")
        if page != name:
            continue
        entries = ", ".join(f"! {word}" for word in words)  # "!": the main entry of the word
        lines = text.splitlines(keepends=True)
        lines.insert(_heading(lines, anchor, place) + 1, f"\n```{{index}} {entries}\n```\n")
        text = "".join(lines)
    return text


def _heading(lines: list[str], anchor: str, place: str) -> int:
    """The line of the heading that has this anchor; without an anchor, that of the page's title."""
    in_code = False
    for number, line in enumerate(lines):
        in_code ^= line.startswith("```")
        title = re.match(r"#+ (.+)", line)
        if title and not in_code and anchor in ("", anchor_of(title[1])):
            return number
    raise ValueError(f"{place}: there is no such heading; scripts/documentation/keywords.py names it")


def anchor_of(title: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
