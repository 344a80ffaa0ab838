"""The pictures of scripts/evidence and the masked autoencoder, on pictures that are made up."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evidence import pictures
from evidence.fetch import fetched
from evidence.mae import MaskedAutoencoder, Shape, normalised, patches_of, sines
from evidence.reconstruct import PictureTask
from evidence.runs import Run
from evidence.setups import optimizer_of
from evidence.sources import PICTURES
from evidence.toys import TINY_MAE, toy_mae, toy_pictures
from evidence.training import Trainer


def test_variants_of_a_picture_are_on_one_side() -> None:
    for names in (("rose", "rose_2", "Rose-03", "rose_mirror", "rose_mirror_2"), ("7", "7")):
        assert len({pictures.family(f"flowers/{name}.png") for name in names}) == 1
        assert len({pictures.is_held_out(f"{name[0]}/{name}.png") for name in names}) == 1
    assert pictures.family("a/rose.png") != pictures.family("a/tulip.png")
    assert 60 < sum(pictures.is_held_out(f"a/picture of {number} things.png") for number in range(1000)) < 140


def test_a_picture_in_a_square() -> None:
    image = pytest.importorskip("PIL.Image")

    def png(width: int, height: int, colour: tuple[int, ...], at: tuple[int, int, int, int]) -> bytes:
        drawn = image.new("RGBA", (width, height), (0, 0, 0, 0))
        drawn.paste(colour, at)
        buffer = io.BytesIO()
        drawn.save(buffer, "PNG")
        return buffer.getvalue()

    wide = pictures.squared(png(100, 40, (255, 0, 0, 255), (20, 10, 60, 30)), 16)  # 40 × 20 are not transparent
    assert wide is not None
    assert wide.shape == (3, 16, 16)
    red = (wide[0] == 255) & (wide[1] == 0)
    assert red.any(1).sum() == 8, "half of the rows are red, the others are filled up with white"
    assert (wide.permute(1, 2, 0)[~red] == 255).all()
    assert pictures.squared(png(9, 9, (5, 5, 5, 255), (0, 0, 9, 9)), 8) is None, "of one colour"
    assert pictures.squared(b"no picture") is None


def test_pictures_are_written_and_read(tmp_path: Path) -> None:
    made = toy_pictures()
    pictures.write("toy", made.train, made.held_out, {"sources": []}, tmp_path)
    again = pictures.read("toy", tmp_path)
    assert torch.equal(again.train, made.train)
    assert torch.equal(again.held_out, made.held_out)
    with pytest.raises(FileNotFoundError, match=r"no pictures of 'other'; `python scripts/evidence/pictures\.py`"):
        pictures.read("other", tmp_path)


def test_an_archive_with_an_epoch_in_its_version_is_found(tmp_path: Path) -> None:
    source = PICTURES[0]
    assert ":" in source.version
    file = tmp_path / f"{source.package}_{source.version.replace(':', '%3a')}_all.deb"  # as apt-get calls it
    file.write_bytes(b"")
    assert fetched(source, tmp_path) == file


def test_patches_and_places() -> None:
    numbers = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = patches_of(numbers, 2)
    assert patches.shape == (2, 4, 12)
    assert torch.equal(patches[1, 1], numbers[1, :, :2, 2:].flatten()), "the second patch of the first row"
    flat = normalised(patches)
    torch.testing.assert_close(flat.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(flat.var(-1), torch.ones(2, 4))
    assert torch.equal(normalised(torch.full((1, 1, 12), 7.0)), torch.zeros(1, 1, 12))
    places = sines(TINY_MAE, 8)
    assert len(places.unique(dim=0)) == TINY_MAE.patches
    with pytest.raises(ValueError, match="multiple of 4"):
        sines(TINY_MAE, 6)


def test_the_model_sees_a_quarter_and_is_judged_by_the_rest() -> None:
    model = toy_mae().model(0).double()
    assert isinstance(model, MaskedAutoencoder)
    assert Shape().visible == 64
    assert Shape().patches == 256
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(1, 3, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(TINY_MAE.patches, generator=generator)[None]
    guesses: list[torch.Tensor] = []
    model.head.register_forward_hook(lambda *call: guesses.append(call[2]))
    model(shown, order)
    (moved,) = torch.autograd.grad(guesses[0].sum(), shown)
    seen = patches_of(moved, TINY_MAE.patch)[0].abs().sum(1) > 0
    assert set(seen.nonzero().flatten().tolist()) == set(order[0, : TINY_MAE.visible].tolist())
    assert guesses[0].shape[1] == TINY_MAE.patches - TINY_MAE.visible
    perfect = normalised(patches_of(shown, TINY_MAE.patch)[:, order[0, TINY_MAE.visible :]])
    model.head.register_forward_hook(lambda *_: perfect)
    assert model(shown, order).item() == pytest.approx(0, abs=1e-12)


def test_batches_are_fixed_by_seed_and_step() -> None:
    task, twin = toy_mae(), toy_mae()
    for step in (0, 5):
        assert all(torch.equal(a, b) for a, b in zip(task.batch(3, step), twin.batch(3, step), strict=True))
    assert not torch.equal(task.batch(3, 0)[1], task.batch(3, 1)[1]), "each step has masks of its own"
    assert not torch.equal(task.batch(3, 0)[0], task.batch(4, 0)[0])
    train = {bytes(p.numpy().tobytes()) for p in (*task.train, *task.train.flip(-1))}
    held_out = {bytes(p.numpy().tobytes()) for p in (*task.held_out, *task.held_out.flip(-1))}
    drawn = {bytes(p.numpy().tobytes()) for step in range(4) for p in task.batch(0, step)[0]}
    assert drawn <= train
    assert not drawn & held_out
    with pytest.raises(ValueError, match="too few pictures for a batch of 64"):
        PictureTask(toy_pictures(), TINY_MAE, batch_size=64)


def test_the_task_is_learned_by_the_loop() -> None:
    task = toy_mae()
    record = Trainer(task, optimizer_of, 60, 30, "cpu").go(Run("toy", "Cautious on AdamW", 1e-2))
    losses = record["validation"]["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert record["measures"] == {}, "this task has no measure besides its loss"
    assert task.evaluate(task.model(0)) == task.evaluate(task.model(0)), "the masks are the same each time"

    other = PictureTask(toy_pictures(), replace(TINY_MAE, masked=0.5), batch_size=8)
    assert other.facts() != task.facts()
