"""Every contender gets the same text, the same start, the same batches and the same schedule."""

from __future__ import annotations

import math

import pytest
import torch
from compare_helpers import ignore, never, text_file, tiny, trainer

from selective.compare import ConfigError, DataConfig, LoopConfig, ModelConfig, data
from selective.compare.model import GPT, hidden_width, loss
from selective.compare.train import fingerprint, schedule


def test_the_standard_library_is_split_by_whole_files():
    small = DataConfig(max_bytes=400_000)
    text = data.load(small, context=16, batch=2)
    assert text.fingerprint == data.load(small, context=16, batch=2).fingerprint
    assert len(text.train) + len(text.validation) <= small.max_bytes
    assert 0.02 < len(text.validation) / small.max_bytes < 0.25
    train, validation = (set(bytes(part.tolist()).split(data.SEPARATOR)) for part in (text.train, text.validation))
    assert not train & validation
    bigger = data.load(DataConfig(max_bytes=800_000), context=16, batch=2)
    larger = set(bytes(bigger.train.tolist()).split(data.SEPARATOR))
    assert not validation & larger  # a file does not change sides with the cap


def test_installed_packages_and_tests_are_no_text(tmp_path):
    for name in ("a.py", "b/c.py", "b/test.py", "site-packages/d.py", "b/test/e.py", "b/tests/f/g.py", "b/h.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass\n")
    found = {path.relative_to(tmp_path).as_posix() for path in data.source_files(tmp_path)}
    assert found == {"a.py", "b/c.py", "b/test.py"}


def test_a_file_is_cut_at_its_end(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_bytes(bytes(range(200)))
    text = data.load(DataConfig(file=path, validation=0.1), context=8, batch=2)
    assert text.train.tolist() == list(range(180))
    assert text.validation.tolist() == list(range(180, 200))


def test_text_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        data.load(DataConfig(file=tmp_path / "missing.txt"), 8, 2)
    with pytest.raises(ConfigError, match="cannot be read"):
        data.load(DataConfig(file=tmp_path), 8, 2)
    path = tmp_path / "short.txt"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="is empty"):
        data.load(DataConfig(file=path), 8, 2)
    path.write_bytes(b"x" * 60)
    with pytest.raises(ConfigError, match=r"only 6 bytes of held-out text, at least 9 are needed"):
        data.load(DataConfig(file=path), 8, 2)


def test_a_batch_is_a_function_of_seed_and_step():
    text = torch.arange(256).repeat(4).to(torch.uint8)
    state = torch.get_rng_state()
    first = data.batch(text, 1, 5, 3, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (3, 9)
    assert torch.equal(first, data.batch(text, 1, 5, 3, 8))
    assert not torch.equal(first, data.batch(text, 1, 6, 3, 8))
    assert not torch.equal(first, data.batch(text, 2, 5, 3, 8))
    assert torch.equal((first[:, 1:] - first[:, :-1]) % 256, torch.ones(3, 8, dtype=torch.int64))  # windows of the text
    exactly = data.batch(text[:9], 0, 0, 2, 8)  # one window fits: it is the only one
    assert torch.equal(exactly, torch.arange(9).expand(2, 9))


def test_held_out_windows_do_not_overlap():
    windows = data.held_out(torch.arange(100).to(torch.uint8), 5, 9)
    assert windows.shape == (5, 10)
    assert len(set(windows.flatten().tolist())) == 50
    assert data.held_out(torch.arange(25).to(torch.uint8), 5, 9).shape == (2, 10)


def test_every_contender_starts_and_learns_from_the_same(tmp_path, monkeypatch):
    config = tiny(tmp_path, policies=["MGUP"], controls=True, steps=3)
    seen: list[list[torch.Tensor]] = []
    real = data.batch

    def spy(*arguments):
        seen[-1].append(real(*arguments))
        return seen[-1][-1]

    monkeypatch.setattr(data, "batch", spy)
    starts = []
    for index in range(3):
        seen.append([])
        run = trainer(config, index)
        starts.append(fingerprint(run.model))
        run.go(never, ignore)
        assert fingerprint(run.model) != starts[-1]
    assert len(set(starts)) == 1
    assert len(seen[0]) == 3
    for others in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], others, strict=True))


def test_the_seed_makes_the_start_and_leaves_the_global_generator_alone():
    config = ModelConfig(layers=1, width=8, heads=2, context=8)
    state = torch.get_rng_state()
    assert fingerprint(GPT(config, 1)) == fingerprint(GPT(config, 1)) != fingerprint(GPT(config, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_schedule_rises_and_falls():
    rate = schedule(LoopConfig(warmup=0.1, final_lr=0.1), 100)
    rates = [rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert schedule(LoopConfig(warmup=0.0), 2)(0) == 1.0  # no warm-up: from the top at once


def test_model_is_causal_and_starts_near_uniform():
    config = ModelConfig(layers=2, width=16, heads=2, context=12)
    model = GPT(config, 0)
    tokens = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens[:, :-1])
        changed = tokens[:, :-1].clone()
        changed[:, 6] = (changed[:, 6] + 1) % 256
        other = model(changed)
        start = loss(model, tokens).item()
    assert logits.shape == (2, 12, 256)
    assert torch.equal(logits[:, :6], other[:, :6])
    assert not torch.equal(logits[:, 6:], other[:, 6:])
    # Logits are sums of 16 products of a normalised feature and a weight of deviation 0.02: within a tenth.
    assert start == pytest.approx(math.log(256), abs=0.1)
    assert hidden_width(128) == 352


def test_rotary_positions_matter():
    """Without them a causal model of one repeated byte would say the same at every position."""
    config = ModelConfig(layers=2, width=16, heads=2, context=8)
    model = GPT(config, 0)
    tokens = torch.tensor([[1, 2, 3, 4, 9]])
    swapped = torch.tensor([[2, 1, 3, 4, 9]])  # the last position attends to the same set in another order
    with torch.no_grad():
        assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], rtol=0, atol=1e-9)


def test_training_learns(tmp_path):
    config = tiny(tmp_path, steps=30)
    record = trainer(config).go(never, ignore)
    assert record["complete"]
    assert record["validation"]["step"] == list(range(0, 31, 2))
    assert len(record["train"]["loss"]) == len(record["optimizer_ms"]) == 30
    assert record["validation"]["loss"][-1] < record["validation"]["loss"][0] - 0.5
    assert text_file(tmp_path).exists()


def test_a_run_that_diverges_ends_and_says_so(tmp_path):
    config = tiny(tmp_path, base="SGD", lr=[1e30], steps=8)
    record = trainer(config).go(never, ignore)
    assert record["diverged"]
    assert record["complete"]
    assert record["steps_done"] < 8
