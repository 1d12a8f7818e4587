"""The VAE with channels last is as exact as in PyTorch's usual layout. Flat pictures are the hardest case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mogle_rt
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.encoders import group_norm as channels_last
from mogle_rt.encoders.group_norm import LEAST_PIXELS, GroupNorm, arranged, exact_norms
from mogle_rt.encoders.vae import autoencoder, load_autoencoder
from tests.checkpoints import write_checkpoint
from tests.conftest import assert_close, relative_rms

LAST = torch.channels_last


def with_weights(groups: int, channels: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.requires_grad_(False)


@pytest.mark.parametrize(("channels", "groups"), [(32, 8), (6, 2), (5, 5), (7, 1)])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (17, 40), (2, 3), (1, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_group_norm(channels: int, groups: int, height: int, width: int, batch: int) -> None:
    norm = with_weights(groups, channels)
    x = 3 * torch.randn(batch, channels, height, width) + torch.randn(channels, 1, 1)
    expected = norm.double()(x.double()).float()
    result = GroupNorm(norm.float())(x.contiguous(memory_format=LAST))
    assert_close(result, expected, rms=5e-7)
    assert result.is_contiguous(memory_format=LAST)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute by one thread: then a single sum has the most terms, and the largest error."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("height", "width"), [(256, 256), (2048, 256), (272, 264), (34, 33)])
def test_group_norm_of_nearly_flat_pictures(height: int, width: int) -> None:
    """A small patch in a flat plane of values far from zero: a region's picture looks like this within the VAE."""
    norm = with_weights(8, 16)
    x = torch.randn(16, 1, 1).expand(1, 16, height, width).clone()
    x[..., height // 3 : height // 2, 10:30] += 0.3 * torch.randn(16, height // 2 - height // 3, 20)
    expected = norm.double()(x.double()).float()
    last = x.contiguous(memory_format=LAST)
    norm.float()
    result = GroupNorm(norm)(last)
    assert_close(result, expected, rms=1.5e-5)
    own, ours = relative_rms(norm(last), expected), relative_rms(result, expected)
    assert own > 10 * ours, "PyTorch's own norm is as exact now, so ours is no longer needed"


def test_gradients_are_left_to_pytorch() -> None:
    norm = GroupNorm(with_weights(2, 6))
    x = torch.randn(1, 6, 4, 5).to(memory_format=LAST).requires_grad_()
    y = x.detach().contiguous().requires_grad_()
    with torch.enable_grad():
        slopes = [torch.autograd.grad(norm(some).square().sum(), some)[0] for some in (x, y)]
    assert_close(*slopes, rms=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 6, 5),
        torch.randn(2, 6, 4, 5),
        torch.randn(2, 6, 4, 5, dtype=torch.float64).to(memory_format=LAST),
    ],
    ids=["three dimensions", "contiguous", "float64"],
)
def test_whatever_else_is_left_to_pytorch(x: Tensor) -> None:
    norm = with_weights(2, 6).to(x.dtype)
    assert torch.equal(GroupNorm(norm)(x), norm(x))


@pytest.mark.quick
def test_layout_by_size() -> None:
    x = torch.randn(1, 3, 4, 4)
    assert arranged(x, LEAST_PIXELS).is_contiguous(memory_format=LAST)
    assert arranged(x.to(memory_format=LAST), LEAST_PIXELS - 1).is_contiguous()
    assert arranged(x.bfloat16(), LEAST_PIXELS).is_contiguous()
    assert arranged(x.to("meta"), LEAST_PIXELS).is_contiguous()


def test_norms_are_put_in_place_with_their_weights() -> None:
    inner = with_weights(1, 4)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(inner, nn.SiLU()))
    names = set(net.state_dict())
    exact_norms(net)
    (replaced,) = (m for m in net.modules() if isinstance(m, nn.GroupNorm))
    assert isinstance(replaced, GroupNorm)
    assert (replaced.weight is inner.weight, replaced.bias is inner.bias, replaced.eps) == (True, True, inner.eps)
    assert set(net.state_dict()) == names


@pytest.mark.quick
def test_vae_keeps_the_layout_and_its_results(tmp_path: Path) -> None:
    """In encoder and decoder, every convolution and norm but the first gets its input with channels last."""
    bundle = Bundle(write_checkpoint(tmp_path).convert(tmp_path / "b.safetensors"))
    cpu = torch.device("cpu")
    vae = load_autoencoder(autoencoder(bundle.config.vae), bundle.part("vae", cpu, torch.float32), "bundle")
    layouts: list[bool] = []
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, GroupNorm)):
            module.register_forward_pre_hook(
                lambda _, x: layouts.append(x[0].dim() == 3 or x[0].is_contiguous(memory_format=LAST))
            )
    picture = torch.full((1, 3, 48, 64), -1.0)
    picture[..., 8:20, 16:40] = 1.0
    z = torch.randn(2, vae.config.latent_channels, 6, 8)

    def encode(x: Tensor) -> Tensor:
        parameters: Tensor = vae.encode(x).latent_dist.parameters
        return parameters

    def decode(x: Tensor) -> Tensor:
        sample: Tensor = vae.decode(x).sample
        return sample

    with torch.inference_mode():
        for function, x in ((encode, picture), (decode, z)):
            plain = function(x)
            layouts.clear()
            assert_close(function(x.contiguous(memory_format=LAST)), plain, rms=5e-6)
            assert layouts
            assert all(layouts)


def noting(call: Callable[[Tensor], Any], inputs: list[Tensor]) -> Callable[[Tensor], Any]:
    """The call, but its inputs are also appended to a list."""

    def noted(x: Tensor) -> Any:
        inputs.append(x)
        return call(x)

    return noted


def test_pipeline_draws_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path).convert(tmp_path / "b.safetensors")
    config = Bundle(checkpoint).config.transformer
    mask = np.zeros((32, 48), np.uint8)
    mask[8:20, 10:30] = 1
    mask[10:12, 12:15] = 4

    def draw() -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Draw images, and return them with the VAE's inputs."""
        pipe, generator = mogle_rt.Pipeline(checkpoint, "cpu", "fp32"), torch.Generator().manual_seed(3)
        given: dict[str, list[Tensor]] = {"encode": [], "decode": []}
        for name in given:
            monkeypatch.setattr(pipe.vae, name, noting(getattr(pipe.vae, name), given[name]))
        images = pipe(
            mask,
            prompt_embeds=torch.randn(1, 4, config.joint_attention_dim, generator=generator),
            pooled_prompt_embeds=torch.randn(1, config.pooled_projection_dim, generator=generator),
            generator=generator,
            height=32,
            width=48,
            num_inference_steps=2,
            num_images_per_prompt=2,
            output_type="pt",
        ).images
        assert isinstance(images, Tensor)
        assert images.is_contiguous()
        assert [len(x) for x in given["decode"]] == [1, 1], "a CPU is faster with one image at a time"
        return images, given

    before, plain = draw()
    monkeypatch.setattr(channels_last, "LEAST_PIXELS", 0)
    after, last = draw()
    for name in ("encode", "decode"):
        assert plain[name]
        assert all(x.is_contiguous() for x in plain[name])
        assert all(x.is_contiguous(memory_format=LAST) and not x.is_contiguous() for x in last[name])
    assert_close(after, before, rms=1e-5)
