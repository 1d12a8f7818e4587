"""Small judges with random weights, in the files that the real ones come in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.checkpoints import write_clip_tokenizer

NAMES = ("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
         "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth")  # fmt: skip

# The layers of InceptionV3: name, input, output channels by 16, and the kernel's sides.
STEM = (("Conv2d_1a_3x3", 3, 2, 3), ("Conv2d_2a_3x3", 2, 2, 3), ("Conv2d_2b_3x3", 2, 4, 3), ("Conv2d_3b_1x1", 4, 5, 1),
        ("Conv2d_4a_3x3", 5, 12, 3))  # fmt: skip
THIN = 2  # channels of each branch of each block


def named(name: str, sides: Sequence[tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    """Layers one after another, numbered from 1."""
    return [(f"{name}_{i}", one) for i, one in enumerate(sides, 1)]


def inception_weights(seed: int = 0) -> dict[str, Tensor]:
    """Weights of a network with InceptionV3's layers and two channels in place of up to hundreds."""
    g = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def layer(name: str, inner: int, outer: int, sides: tuple[int, int]) -> None:
        weights[f"{name}.conv.weight"] = (
            torch.randn(outer, inner, *sides, generator=g) * (2 / inner / np.prod(sides)) ** 0.5
        )
        weights[f"{name}.bn.running_mean"] = torch.randn(outer, generator=g) * 0.1
        weights[f"{name}.bn.running_var"] = torch.rand(outer, generator=g) + 0.5
        weights[f"{name}.bn.weight"] = torch.rand(outer, generator=g) + 0.5
        weights[f"{name}.bn.bias"] = torch.randn(outer, generator=g) * 0.1

    for name, inner, outer, side in STEM:
        layer(name, inner, outer, (side, side))
    channels = STEM[-1][2]
    tall, wide = (7, 1), (1, 7)
    for block in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
        one, three = (1, 1), (3, 3)
        double = [("branch3x3dbl_1", one), ("branch3x3dbl_2", three), ("branch3x3dbl_3", three)]
        chains: list[list[tuple[str, tuple[int, int]]]] = [[("branch1x1", one)], [("branch_pool", one)]]
        if block == "6a":
            chains = [[("branch3x3", three)], double]
        elif block == "7a":
            deep = named("branch7x7x3", (one, wide, tall, three))
            chains = [[("branch3x3_1", one), ("branch3x3_2", three)], deep]
        elif block[0] == "5":
            chains += [[("branch5x5_1", one), ("branch5x5_2", (5, 5))], double]
        elif block[0] == "6":
            chains += [named("branch7x7", (one, wide, tall)), named("branch7x7dbl", (one, tall, wide, tall, wide))]
        else:
            chains += [[("branch3x3_1", one)], double[:2]]
        for chain in chains:
            inner = channels
            for name, sides in chain:
                layer(f"Mixed_{block}.{name}", inner, THIN, sides)
                inner = THIN
        if block in ("7b", "7c"):
            for (branch, i), (half, sides) in itertools.product(
                (("branch3x3", 2), ("branch3x3dbl", 3)), (("a", (1, 3)), ("b", (3, 1)))
            ):
                layer(f"Mixed_{block}.{branch}_{i}{half}", THIN, THIN, sides)
        channels = THIN * {"6a": 2, "7a": 2, "7b": 6, "7c": 6}.get(block, 4) + (
            channels if block in ("6a", "7a") else 0
        )
    return weights


def write_inception(path: Path) -> Path:
    torch.save(inception_weights(), path)
    return path


def write_clip(folder: Path, side: int = 32) -> Path:
    """A CLIP of two layers, with its tokenizer, in transformers' format."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    words = write_clip_tokenizer(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    config = CLIPConfig(
        text_config=small | ends | {"vocab_size": words, "max_position_embeddings": 12},
        vision_config=small | {"image_size": side, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)
    return folder


def write_parser(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """A SegFormer of one layer a stage, in transformers' format."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def write_face_network(path: Path, *, batch: int | str = "n", channels: int = 3) -> Path:
    """A network that averages an eighth of the picture's columns each, as ONNX: [n, 3, 16, 16] -> [n, 24]."""
    import onnx
    from onnx import TensorProto, helper

    pool = helper.make_node("AveragePool", ["x"], ["p"], kernel_shape=[16, 2], strides=[16, 2])
    flat = helper.make_node("Flatten", ["p"], ["y"])
    graph = helper.make_graph(
        [pool, flat],
        "faces",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, channels, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 8 * channels])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def write_images(folder: Path, names: list[str], seed: int, side: int = 32) -> Path:
    """Pictures of random blocks, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name in names:
        blocks = rng.integers(0, 256, (side // 8, side // 8, 3)).astype(np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(folder / name)
    return folder


def write_masks(folder: Path, stems: list[str], seed: int = 0, side: int = 32) -> Path:
    """Masks of random blocks of classes, as label maps."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for stem in stems:
        blocks = rng.integers(0, 19, (side // 8, side // 8)).astype(np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(folder / f"{stem}.png")
    return folder
