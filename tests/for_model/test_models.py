"""`SelectiveUpdate.for_model` on models that people train: what it decides for each parameter, and a few steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optional import missing
from torch import Tensor, nn

from selective import MGUP, Cautious, SelectiveUpdate, Soap

needs_transformers = pytest.mark.skipif(bool(missing(["transformers"])), reason="needs transformers")


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def kinds(opt: Any) -> dict[str, str]:
    """The kind of each parameter, by its name."""
    return {name: group["name"] for group in opt.param_groups for name in group["param_names"]}


def settings(opt: Any) -> dict[str, tuple[Any, ...]]:
    """By kind: weight decay, policy, preconditioner and view."""
    return {
        group["name"]: (
            group["weight_decay"], own.policy.kind, own.preconditioning.preconditioner, own.preconditioning.matrix_view
        )
        for group, own in zip(opt.param_groups, opt.policy_groups, strict=True)
    }  # fmt: skip


def trained(opt: Any, loss_of: Callable[[], Tensor], steps: int = 5) -> tuple[float, float]:
    """The first and the last loss."""
    losses = []
    for _ in range(steps):
        loss = loss_of()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@needs_transformers
def test_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=8))
    opt = SelectiveUpdate.for_model(
        model, "adamw", lr=1e-2, weight_decay=0.1, policy="cautious", preconditioner=Soap(refresh_every=2)
    )
    vectors = [name for name, p in model.named_parameters() if p.dim() == 1]
    layer = "transformer.h.0."
    assert kinds(opt) == {
        f"{layer}attn.c_attn.weight": "columns:3",
        f"{layer}attn.c_proj.weight": "matrices", f"{layer}mlp.c_fc.weight": "matrices",
        f"{layer}mlp.c_proj.weight": "matrices",
        "transformer.wte.weight": "embeddings", "transformer.wpe.weight": "embeddings",  # the first is the head, too
        **dict.fromkeys(vectors, "vectors"),
    }  # fmt: skip
    soap = Soap(refresh_every=2)
    assert settings(opt) == {
        "matrices": (0.1, "Cautious", soap, "matrices"),
        "columns:3": (0.1, "Cautious", soap, "columns:3"),
        "embeddings": (0.1, "Dense", None, "matrices"),
        "vectors": (0.0, "Dense", None, "matrices"),
    }
    assert {group["lr"] for group in opt.param_groups} == {1e-2}
    assert "attn.c_attn.weight as 3 of 16 x 16" in opt.explain()
    ids = torch.arange(8)[None]
    first, last = trained(opt, lambda: model(ids, labels=ids).loss)
    assert last < first
    assert set(opt.statistics()) == {name for name, kind in kinds(opt).items() if kind in ("matrices", "columns:3")}


@needs_transformers
def test_mixtral() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    opt = SelectiveUpdate.for_model(model, "AdamW", lr=1e-2, policy="mgup", preconditioner="adadiag++")
    layer = "model.layers.0."
    found = kinds(opt)
    projections = [f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"]
    assert found == {
        "model.embed_tokens.weight": "embeddings",
        "lm_head.weight": "head",
        f"{layer}mlp.experts.gate_up_proj": "rows:2",
        f"{layer}mlp.experts.down_proj": "experts",
        f"{layer}mlp.gate.weight": "routers",
        **dict.fromkeys(projections, "matrices"),
        **{name: "vectors" for name, p in model.named_parameters() if p.dim() == 1},
    }
    chosen = settings(opt)
    assert chosen["routers"] == (0.01, "Dense", None, "matrices")  # AdamW's own decay, and not selected, not rotated
    assert chosen["rows:2"][1:] == ("MGUP", chosen["matrices"][2], "rows:2")
    assert (chosen["vectors"][0], chosen["embeddings"][0], chosen["head"][0]) == (0.0, 0.01, 0.01)
    ids = torch.arange(16)[None]
    first, last = trained(opt, lambda: model(ids, labels=ids).loss)
    assert last < first


@needs_transformers
def test_a_vit_and_its_policy_by_kind() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=5, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    opt = SelectiveUpdate.for_model(
        model, "sgd", momentum=0.9, lr={"head": 0.2, "rest": 0.05}, policy={"matrices": MGUP(), "head": "cautious"}
    )
    found = kinds(opt)
    of_kind = {kind: {name for name, each in found.items() if each == kind} for kind in found.values()}
    assert of_kind["embeddings"] == {"vit.embeddings.position_embeddings"}
    assert of_kind["conv"] == {"vit.embeddings.patch_embeddings.projection.weight"}
    assert of_kind["head"] == {"classifier.weight"}
    assert of_kind["matrices"] == {
        name for name, p in model.vit.named_parameters("vit") if ".layers." in name and p.dim() == 2
    }
    assert len(found) == len(list(model.parameters())) and len(of_kind) == 5
    assert {group["name"]: group["lr"] for group in opt.param_groups} == {
        "matrices": 0.05, "conv": 0.05, "embeddings": 0.05, "head": 0.2, "vectors": 0.05,
    }  # fmt: skip
    assert {kind: each[1] for kind, each in settings(opt).items()} == {
        "matrices": "MGUP", "conv": "MGUP", "embeddings": "Dense", "head": "Cautious", "vectors": "Dense",
    }  # fmt: skip
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 5
    first, last = trained(opt, lambda: model(images, labels=labels).loss)
    assert last < first


@needs_transformers
def test_a_resnet() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    model = ResNetForImageClassification(config)
    opt = SelectiveUpdate.for_model(
        model, torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3, policy="mgup", preconditioner="soap"
    )
    found = kinds(opt)
    assert found == {
        name: "head" if name == "classifier.1.weight" else "conv" if p.dim() == 4 else "vectors"
        for name, p in model.named_parameters()
    }
    assert settings(opt)["conv"] == (1e-3, "MGUP", Soap(), "conv")
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    first, last = trained(opt, lambda: model(images, labels=labels).loss)
    assert last < first


class ResNet(nn.Module):
    """Called as torchvision and timm call it: the head is `fc`, and timm's says so in `get_classifier`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 4)


def test_the_head_of_torchvisions_resnet() -> None:
    found = kinds(SelectiveUpdate.for_model(ResNet(), policy="mgup"))
    assert found == {"conv1.weight": "conv", "fc.weight": "head", "conv1.bias": "vectors", "fc.bias": "vectors"}
    wrapped = nn.ModuleDict({"module": ResNet()})  # as DistributedDataParallel has it
    assert kinds(SelectiveUpdate.for_model(wrapped, policy="mgup"))["module.fc.weight"] == "head"
    inner = nn.Sequential(nn.ModuleDict({"fc": nn.Linear(4, 4)}), nn.Linear(4, 4))  # of a block, and not the last
    assert set(kinds(SelectiveUpdate.for_model(inner, policy="mgup")).values()) == {"matrices", "vectors"}


class LoRA(nn.Module):
    """As peft has it: a frozen layer, and adapters in dictionaries by the adapter's name."""

    def __init__(self, frozen: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = frozen
        self.lora_A = nn.ModuleDict({"default": nn.Linear(frozen.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, frozen.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.qkv = nn.Linear(8, 24)
        self.classifier = nn.Linear(24, 5)
        for p in self.parameters():
            p.requires_grad_(False)
        self.qkv, self.classifier = LoRA(self.qkv), LoRA(self.classifier)

    def get_output_embeddings(self) -> nn.Module:
        return self.classifier

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.qkv(self.embed(ids))))


def test_a_lora_model() -> None:
    model = Adapted()
    frozen = copy.deepcopy({name: p for name, p in model.named_parameters() if not p.requires_grad})
    opt = SelectiveUpdate.for_model(model, "adamw", lr=1e-2, policy="cautious")
    adapters = [f"{layer}.lora_{side}.default.weight" for layer in ("qkv", "classifier") for side in "AB"]
    assert kinds(opt) == dict.fromkeys(adapters, "matrices")  # the head's too, and none is taken apart
    assert settings(opt) == {"matrices": (0.01, "Cautious", None, "matrices")}
    ids, labels = torch.arange(12), torch.arange(12) % 5
    first, last = trained(opt, lambda: nn.functional.cross_entropy(model(ids), labels))
    assert last < first
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


class Timm(nn.Module):
    """Answers as timm's models do: the head by `get_classifier`, and what does not decay by name and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.table = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(9, 2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24), "scale": nn.Linear(8, 8)})
        self.fc_norm, self.out, self.aux = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 4)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        return self.out, self.aux

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "attn.scale.weight"}

    def no_weight_decay_keywords(self) -> set[str]:
        return {"table"}


def test_what_a_timm_model_answers() -> None:
    for model, prefix in ((Timm(), ""), (nn.ModuleDict({"backbone": Timm()}), "backbone.")):
        opt = SelectiveUpdate.for_model(model, weight_decay=0.1, policy=Cautious())
        found = {name.removeprefix(prefix): kind for name, kind in kinds(opt).items()}
        assert {name: kind for name, kind in found.items() if kind != "vectors"} == {
            "attn.qkv.weight": "rows:3", "attn.scale.weight": "matrices, no decay", "table": "matrices, no decay",
            "out.weight": "head", "aux.weight": "head",
        }  # fmt: skip
        assert settings(opt)["matrices, no decay"] == (0.0, "Cautious", None, "matrices")
        assert settings(opt)["rows:3"][0] == settings(opt)["head"][0] == 0.1
