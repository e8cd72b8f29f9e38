"""Photographs as input, and calibration of batch-norm statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres import models
from fastres.errors import UserError
from fastres.images import IMAGENET_MEAN, IMAGENET_STD, calibrate_, open_image, photographs

pytest.importorskip("PIL", reason="Pillow is not installed")


def denormalised(images: Tensor) -> Tensor:
    return images * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


def save(path: Path, colour: Any, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


# Photographs ---------------------------------------------------------------------------------------------------------


def test_bundled_photographs() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    images = photographs(5, 96)
    assert images.shape == (5, 3, 96, 96) and images.dtype == torch.float32 and images.is_contiguous()
    pixels = denormalised(images)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert images.std() > 0.5 and images.mean().abs() < 1.5
    assert all(not torch.equal(images[i], images[j]) for i in range(5) for j in range(i))


def test_photographs_depend_on_seed_and_index_only() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    images = photographs(5, 32)
    torch.manual_seed(9)
    assert torch.equal(photographs(5, 32), images)
    assert torch.equal(photographs(3, 32), images[:3])
    assert not torch.equal(photographs(5, 32, seed=1), images)


def test_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    save(tmp_path / "b.png", (255, 0, 0))
    save(tmp_path / "a" / "deep" / "x.JPG", (0, 0, 255))
    save(tmp_path / "c.png", 255, mode="L")
    save(tmp_path / "d.png", (0, 255, 0, 128), mode="RGBA")
    save(tmp_path / ".hidden.png", 0, mode="L")
    (tmp_path / "README.txt").write_text("not an image")
    pixels = denormalised(photographs(6, 8, folder=tmp_path))
    colours = [(0, 0, 1), (1, 0, 0), (1, 1, 1), (0, 1, 0), (0, 0, 1), (1, 0, 0)]  # cycles after four
    for image, colour in zip(pixels, colours, strict=True):
        torch.testing.assert_close(image.mean((1, 2)), torch.tensor(colour, dtype=torch.float32), atol=0.02, rtol=0)


def test_cycling_gives_other_crops(tmp_path: Path) -> None:
    from PIL import Image

    gradient = torch.arange(64 * 64, dtype=torch.uint8).view(64, 64).numpy()
    Image.fromarray(gradient).save(tmp_path / "one.png")
    images = photographs(3, 16, folder=tmp_path)
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_camera_orientation_is_respected(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.new("RGB", (20, 10), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 20, 10))  # red left, blue right; turned by 90 degrees: red above, blue below
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 0, 0) and upright.getpixel((5, 17)) == (0, 0, 255)


def test_tiny_image(tmp_path: Path) -> None:
    save(tmp_path / "dot.png", (255, 255, 255), size=(1, 1))
    torch.testing.assert_close(denormalised(photographs(2, 4, folder=tmp_path)), torch.ones(2, 3, 4, 4))


def test_deep_colour_is_refused_rather_than_clipped(tmp_path: Path) -> None:
    save(tmp_path / "scan.png", 40_000, mode="I;16")
    with pytest.raises(UserError, match=r"scan\.png: more than 8 bits per channel"):
        photographs(1, 8, folder=tmp_path)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_unreadable_image_is_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path / "a.png", (9, 9, 9))
    good = (tmp_path / "a.png").read_bytes()
    (tmp_path / "bad.png").write_bytes({"empty": b"", "text": b"hello", "truncated": good[:-30]}[damage])
    with pytest.raises(UserError, match=r"cannot read image .*bad\.png: ") as error:
        photographs(2, 8, folder=tmp_path)
    assert "\n" not in str(error.value)
    assert photographs(1, 8, folder=tmp_path).shape == (1, 3, 8, 8)  # files that are not needed are not opened


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="no images in"):
        photographs(1, folder=tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        photographs(1, folder=tmp_path / "notes.txt")
    with pytest.raises(UserError, match="no such folder"):
        photographs(1, folder=tmp_path / "nowhere")


@pytest.mark.parametrize(("n", "size"), [(0, 8), (-1, 8), (1, 0)])
def test_no_images_asked_for(n: int, size: int) -> None:
    with pytest.raises(UserError, match="at least one image"):
        photographs(n, size)


# Calibration ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def images() -> Tensor:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    return photographs(9, 64)


def test_calibrated_activations_are_sane(images: Tensor) -> None:
    model = models.resnet50(fused=False).eval()
    calibrate_(model, images, batch_size=5)
    deviations = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, x, y: deviations.append(float(y.std())))
    with torch.inference_mode():
        logits = model(images)
    assert logits.isfinite().all()
    assert len(deviations) == 53 and all(0.5 < deviation < 2 for deviation in deviations)


def test_calibrate_a_fused_model(images: Tensor) -> None:
    plain, fused = models.resnet18(fused=False), models.resnet18()
    fused.load_state_dict(plain.state_dict())
    calibrate_(plain, images, batch_size=5)
    calibrate_(fused, images, batch_size=5)
    for key, value in fused.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-3, atol=1e-4, msg=key)


def test_calibrate_is_update_bn(images: Tensor) -> None:
    ours, theirs = models.resnet18(fused=False), models.resnet18(fused=False)
    theirs.load_state_dict(ours.state_dict())
    ours(images)  # statistics that must not count
    calibrate_(ours, images, batch_size=3)
    torch.optim.swa_utils.update_bn(images.split(3), theirs)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def small_model() -> nn.Sequential:
    norms = nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm2d(4, momentum=None)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.Dropout(0.5), norms[1])


def test_calibrate_restores_modes_and_momentum() -> None:
    model = small_model().train()
    model[1].eval()  # frozen by its user
    calibrate_(model, torch.randn(5, 3, 8, 8), batch_size=2)
    assert [m.training for m in model] == [True, False, True, True] and model.training
    assert model[1].momentum == 0.3 and model[3].momentum is None
    assert model[1].num_batches_tracked == 3 and model[1].running_mean.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_calibrate_ignores_dropout() -> None:
    model, x = small_model(), torch.randn(4, 3, 8, 8)
    calibrate_(model, x, batch_size=4)
    expected = model[3].running_var.clone()
    assert torch.equal(calibrate_(model, x, batch_size=4)[3].running_var, expected)


def test_calibrate_that_fails_changes_nothing() -> None:
    model = small_model().eval()
    model(torch.randn(2, 3, 8, 8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.append(nn.Conv2d(5, 1, 1).eval())  # does not fit
    before.update({f"4.{key}": value for key, value in model[4].state_dict().items()})
    with pytest.raises(RuntimeError):
        calibrate_(model, torch.randn(4, 3, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[1].momentum == 0.3 and not any(m.training for m in model.modules())


def test_calibrate_small_images_in_batches_of_two() -> None:
    """The last stage is 1x1 pixels: a batch of one image would have one value per channel."""
    model = models.resnet18(fused=False)
    calibrate_(model, torch.randn(5, 3, 32, 32), batch_size=4)
    assert model.bn1.num_batches_tracked == 2


def test_calibrate_without_statistics_or_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    calibrate_(model, torch.randn(2, 3, 8, 8))
    assert model[1].running_mean is None and model[1].momentum == 0.1
    with pytest.raises(UserError, match="at least one image"):
        calibrate_(model, torch.empty(0, 3, 8, 8))


def test_calibrate_moves_images_to_the_models_dtype() -> None:
    model = small_model().to(torch.bfloat16)
    calibrate_(model, torch.randn(4, 3, 8, 8))
    assert model[1].running_var.isfinite().all()
