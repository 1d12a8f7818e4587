"""One small model, in every form in which people share FLUX, gives the same tensors in the bundle.

FLUX's own layout is written out by hand here, from black-forest-labs/flux's ``model.py`` and ``layers.py``: the test
joins the layers that the converter must take apart.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mogle_rt
from mogle_rt import CheckpointError
from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import FLUX_DEV
from mogle_rt.conversion.lora import read_adapter
from mogle_rt.conversion.single_file import read_transformer
from tests.checkpoints import TINY, Files

Tensors = dict[str, Tensor]
LORA_MODULES = schema.lora_modules(TINY)


def flux_names(t: Tensors) -> Tensors:
    """diffusers' tensors of the tiny transformer, in FLUX's own layout."""
    out: Tensors = {}

    def put(name: str, *stored: str) -> None:
        for kind in ("weight", "bias"):
            out[f"{name}.{kind}"] = torch.cat([t[f"{s}.{kind}"] for s in stored])

    for mine, theirs in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        for i, layer in enumerate(("in_layer", "out_layer"), 1):
            put(f"{mine}.{layer}", f"time_text_embed.{theirs}_embedder.linear_{i}")
    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    put("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):  # FLUX: shift, scale = ...chunk(2); diffusers: scale, shift = ...chunk(2)
        scale, shift = t[f"norm_out.linear.{kind}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for i in range(TINY.num_layers):
        d, s = f"double_blocks.{i}", f"transformer_blocks.{i}"
        put(f"{d}.img_mod.lin", f"{s}.norm1.linear")
        put(f"{d}.txt_mod.lin", f"{s}.norm1_context.linear")
        put(f"{d}.img_attn.qkv", f"{s}.attn.to_q", f"{s}.attn.to_k", f"{s}.attn.to_v")
        put(f"{d}.txt_attn.qkv", f"{s}.attn.add_q_proj", f"{s}.attn.add_k_proj", f"{s}.attn.add_v_proj")
        put(f"{d}.img_attn.proj", f"{s}.attn.to_out.0")
        put(f"{d}.txt_attn.proj", f"{s}.attn.to_add_out")
        put(f"{d}.img_mlp.0", f"{s}.ff.net.0.proj")
        put(f"{d}.img_mlp.2", f"{s}.ff.net.2")
        put(f"{d}.txt_mlp.0", f"{s}.ff_context.net.0.proj")
        put(f"{d}.txt_mlp.2", f"{s}.ff_context.net.2")
        for stream, q, k in (("img", "norm_q", "norm_k"), ("txt", "norm_added_q", "norm_added_k")):
            out[f"{d}.{stream}_attn.norm.query_norm.scale"] = t[f"{s}.attn.{q}.weight"]
            out[f"{d}.{stream}_attn.norm.key_norm.scale"] = t[f"{s}.attn.{k}.weight"]
    for i in range(TINY.num_single_layers):
        d, s = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        put(f"{d}.modulation.lin", f"{s}.norm.linear")
        put(f"{d}.linear1", f"{s}.attn.to_q", f"{s}.attn.to_k", f"{s}.attn.to_v", f"{s}.proj_mlp")
        put(f"{d}.linear2", f"{s}.proj_out")
        out[f"{d}.norm.query_norm.scale"] = t[f"{s}.attn.norm_q.weight"]
        out[f"{d}.norm.key_norm.scale"] = t[f"{s}.attn.norm_k.weight"]
    return out


@pytest.fixture(scope="module")
def stored(tiny_files: Files) -> Tensors:
    (path,) = (tiny_files.flux / "transformer").glob("*.safetensors")
    return load_file(path)


def convert_file(files: Files, transformer: Path, output: Path, **options: Any) -> Tensors:
    mogle_rt.convert(files.flux, files.lora, files.mogle, output, transformer=transformer, progress=False, **options)
    return {n.removeprefix("transformer."): t for n, t in load_file(output).items() if n.startswith("transformer.")}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.quick
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flux_s_own_names(prefix: str, dtype: torch.dtype, tiny_files: Files, stored: Tensors, tmp_path: Path) -> None:
    expected = {n: t.to(dtype) for n, t in stored.items()}
    others = {"vae.encoder.conv_in.weight": torch.ones(2), "text_encoders.clip_l.x": torch.ones(3)} if prefix else {}
    named = {f"{prefix}{n}": t for n, t in flux_names(expected).items()}
    assert len(named) == len(set(named))
    save_file(named | others, tmp_path / "flux1-dev.safetensors")
    assert_same(convert_file(tiny_files, tmp_path / "flux1-dev.safetensors", tmp_path / "b.safetensors"), expected)


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
def test_diffusers_names_in_one_file(prefix: str, tiny_files: Files, stored: Tensors, tmp_path: Path) -> None:
    save_file({f"{prefix}{n}": t for n, t in stored.items()}, tmp_path / "t.safetensors")
    assert_same(convert_file(tiny_files, tmp_path / "t.safetensors", tmp_path / "b.safetensors"), stored)


@pytest.mark.parametrize(("scale_name", "marked"), [("scale_weight", True), ("weight_scale", False)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scaled_fp8(
    scale_name: str, marked: bool, shape: tuple[int, ...], tiny_files: Files, stored: Tensors, tmp_path: Path
) -> None:
    """ComfyUI's form: a weight is its fp8 value times the layer's scale. e4m3 rounds by half of 2**-3 of a value."""
    named, expected = flux_names(stored), dict(stored)
    for name, tensor in list(named.items()):
        if tensor.ndim == 2 and name.startswith(("double", "single")):
            scale = float(tensor.abs().max()) / 448
            named[name] = (tensor / scale).to(torch.float8_e4m3fn)
            named[f"{name.removesuffix('.weight')}.{scale_name}"] = torch.tensor(scale).reshape(shape)
            named[f"{name.removesuffix('.weight')}.scale_input"] = torch.ones(())
    if marked:
        named["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(named, tmp_path / "fp8.safetensors")
    found = convert_file(tiny_files, tmp_path / "fp8.safetensors", tmp_path / "b.safetensors")
    for name, tensor in expected.items():
        eight_bits = tensor.ndim == 2 and "blocks" in name
        assert found[name].dtype == (torch.bfloat16 if eight_bits else torch.float32), name
        if not eight_bits:
            assert torch.equal(found[name], tensor), name
        else:  # the smallest numbers lie evenly, 2**-9 times the scale apart; a stacked layer has the largest one's
            least = float(tensor.abs().max()) * 8 / 448 * 2**-9
            bound = tensor.abs() * (2**-4 + 2**-8) + least
            assert bool(((found[name].float() - tensor).abs() <= bound).all()), name


def test_plain_fp8_has_no_scale(tiny_files: Files, stored: Tensors, tmp_path: Path) -> None:
    named = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in flux_names(stored).items()}
    save_file(named, tmp_path / "fp8.safetensors")
    found = convert_file(tiny_files, tmp_path / "fp8.safetensors", tmp_path / "b.safetensors", dtype="fp32")
    assert_same(found, {n: t.to(torch.float8_e4m3fn).float() if t.ndim == 2 else t for n, t in stored.items()})


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf(kind: str, tiny_files: Files, stored: Tensors, tmp_path: Path) -> None:
    """The gguf package itself writes the file. Q8_0 rounds 32 numbers together, by 1/254 of their largest at most."""
    gguf = pytest.importorskip("gguf")
    from gguf.quants import quantize

    path, quant = tmp_path / "flux.gguf", getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(path, "flux")
    packed = set()
    for name, tensor in flux_names(stored).items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            packed.add(name)
            writer.add_tensor(name, quantize(tensor.numpy(), quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, tensor.numpy().astype(np.float32))
    assert packed
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = convert_file(tiny_files, path, tmp_path / "b.safetensors", dtype="fp32")
    assert found.keys() == stored.keys()
    step = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-8, "Q4_0": 1 / 8 + 2**-8}[kind]
    for name, tensor in stored.items():
        error = float((found[name] - tensor).abs().max())
        assert error <= step * float(tensor.abs().max()) * 1.01, name
    kept = convert_file(tiny_files, path, tmp_path / "c.safetensors")
    expected = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    assert kept["transformer_blocks.0.attn.to_q.weight"].dtype == expected


def test_the_configuration_is_read_off_flux_s_shapes(tmp_path: Path) -> None:
    """With FLUX's head size, how it is divided into axes is known, so no folder with a configuration is needed."""
    small = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 8}
    config = type(FLUX_DEV).from_mapping(FLUX_DEV.to_dict() | small | {"pooled_projection_dim": 4})
    named: Tensors = {}
    for name in ("double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.1.norm.query_norm.scale"):
        named[name] = torch.ones(128)
    named["single_blocks.0.linear2.bias"] = torch.ones(128)
    named["img_in.weight"], named["txt_in.weight"] = torch.ones(128, 64), torch.ones(128, 8)
    named["vector_in.in_layer.weight"] = torch.ones(128, 4)
    named["guidance_in.in_layer.weight"] = torch.ones(128, 256)
    save_file(named, tmp_path / "t.safetensors")
    assert read_transformer(tmp_path / "t.safetensors", None)[1] == config


# Folders


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("sharded", [None, "before", "after"])
def test_variants_of_a_folder(
    both: bool, sharded: str | None, tiny_files: Files, stored: Tensors, tmp_path: Path
) -> None:
    """``*.fp16.safetensors`` is taken where it is alone; where the plain file lies beside it, the plain one is taken."""
    files = Files(Path(shutil.copytree(tiny_files.folder, tmp_path / "sources")))
    folder = files.flux / "transformer"
    (plain,) = folder.glob("*.safetensors")
    half = {n: t.half() for n, t in stored.items()}
    if sharded is None:
        save_file(half, plain.with_suffix(".fp16.safetensors"))
    else:
        names = sorted(half)
        weight_map: dict[str, str] = {}
        for i in range(2):
            number = f"-{i + 1:05}-of-00002"
            shard = (
                f"{plain.stem}.fp16{number}.safetensors"
                if sharded == "before"
                else f"{plain.stem}{number}.fp16.safetensors"
            )
            save_file({n: half[n] for n in names[i::2]}, folder / shard)
            weight_map |= dict.fromkeys(names[i::2], shard)
        (folder / f"{plain.name}.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    if not both:
        plain.unlink()
    files.convert(tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")["transformer.proj_out.weight"]
    assert found.dtype == (torch.float32 if both else torch.float16)


def test_several_variants_are_refused(tiny_files: Files, tmp_path: Path) -> None:
    files = Files(Path(shutil.copytree(tiny_files.folder, tmp_path / "sources")))
    (plain,) = (files.flux / "vae").glob("*.safetensors")
    shutil.copy(plain, plain.with_suffix(".bf16.safetensors"))
    plain.rename(plain.with_suffix(".fp16.safetensors"))
    with pytest.raises(CheckpointError, match=r"several variants \(bf16, fp16\)"):
        files.convert(tmp_path / "b.safetensors")


def change_weights(path: Path, change: Callable[[Tensors], object]) -> None:
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({n: t.clone() for n, t in tensors.items()}, file)


def test_a_projection_of_clip_is_left_out(tiny_files: Files, tiny_bundle: Path, tmp_path: Path) -> None:
    files = Files(Path(shutil.copytree(tiny_files.folder, tmp_path / "sources")))
    change_weights(files.flux / "text_encoder", lambda t: t.update({"text_projection.weight": torch.ones(16, 16)}))
    files.convert(tmp_path / "b.safetensors")
    assert_same(load_file(tmp_path / "b.safetensors"), load_file(tiny_bundle))


def test_t5_s_embedding_under_either_name(tiny_files: Files, tiny_bundle: Path, tmp_path: Path) -> None:
    files = Files(Path(shutil.copytree(tiny_files.folder, tmp_path / "sources")))
    encoder = files.flux / "text_encoder_2"
    prompts = ["a young woman", "an old man"]

    def embeddings(bundle: Path) -> list[Tensor]:
        from mogle_rt.encoders.text import TextEncoders

        return list(TextEncoders(Bundle(bundle), torch.device("cpu"), torch.float32).encode(prompts, 16))

    expected = embeddings(tiny_bundle)
    change_weights(encoder, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"]}))
    files.convert(tmp_path / "both.safetensors")
    change_weights(encoder, lambda t: t.pop("shared.weight"))
    files.convert(tmp_path / "other.safetensors")
    for name in ("both", "other"):
        for found, wanted in zip(embeddings(tmp_path / f"{name}.safetensors"), expected, strict=True):
            assert torch.equal(found, wanted), name
    change_weights(encoder, lambda t: t.update({"shared.weight": t["encoder.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match="one embedding under two names, but differ"):
        files.convert(tmp_path / "differ.safetensors")


# Other models and damaged files


def in_eight_bits(tensors: Tensors, scale: str) -> Tensors:
    weight = tensors["img_in.weight"].to(torch.float8_e4m3fn)
    return {"img_in.weight": weight, "img_in.scale_weight": torch.tensor(float(scale))}


BAD: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "fill": (lambda t: t.update({"img_in.weight": torch.ones(32, 384)}), "unexpected|FLUX.1-Fill|shape"),
    "nf4": (
        lambda t: t.update({"img_in.weight.absmax": torch.ones(2), "img_in.weight.quant_map": torch.ones(16)}),
        "bitsandbytes' 4-bit formats",
    ),
    "another_model": (lambda t: [t.pop(n) for n in list(t) if "double_blocks" in n], "holds no FLUX transformer"),
    "missing": (
        lambda t: t.pop("single_blocks.1.linear2.bias"),
        r"missing tensor 'single_transformer_blocks\.1\.proj_out",
    ),
    "unexpected": (
        lambda t: t.update({"double_blocks.0.extra": torch.ones(1)}),
        r"unexpected tensor 'double_blocks\.0\.extra",
    ),
    "rows": (
        lambda t: t.update({"single_blocks.0.linear1.weight": torch.ones(100, 32)}),
        r"'single_blocks\.0\.linear1\.weight' has 100 rows, expected 224",
    ),
    "scale_of_nothing": (lambda t: t.update({"double_blocks.9.x.scale_weight": torch.ones(())}), "no such weight"),
    "scale_of_floats": (lambda t: t.update({"img_in.scale_weight": torch.ones(())}), "not in eight bits"),
    **{
        f"scale_{scale}": (
            partial(lambda scale, t: t.update(in_eight_bits(t, scale)), scale),
            rf"'img_in\.scale_weight' is {scale}",
        )
        for scale in ("0", "-1", "inf", "nan")
    },
    **{
        f"single_number_{name}": (
            partial(lambda name, t: t.update({name: torch.ones(())}), name),
            rf"'{re.escape(name)}' is a single number",
        )
        for name in ("img_in.weight", "double_blocks.0.img_attn.qkv.bias", "final_layer.adaLN_modulation.1.weight")
    },
    "scales_by_row": (lambda t: t.update({"img_in.weight_scale": torch.ones(32)}), "one scale for a whole weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_single_files(name: str, tiny_files: Files, stored: Tensors, tmp_path: Path) -> None:
    change, message = BAD[name]
    named = flux_names(stored)
    change(named)
    save_file(named, tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_file(tiny_files, tmp_path / "t.safetensors", tmp_path / "b.safetensors")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b.safetensors").exists()


def test_other_models_of_the_family_are_named(tiny_files: Files, tmp_path: Path) -> None:
    files = Files(Path(shutil.copytree(tiny_files.folder, tmp_path / "sources")))
    path = files.flux / "transformer" / "config.json"
    config = json.loads(path.read_text())
    for values, words in (
        ({"in_channels": 384, "out_channels": 64}, "this is FLUX.1-Fill"),
        ({"in_channels": 128, "out_channels": 64}, "this is FLUX.1-Depth or FLUX.1-Canny"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"weights are quantised \(bitsandbytes\)"),
    ):
        path.write_text(json.dumps(config | values))
        with pytest.raises(CheckpointError, match=words):
            files.convert(tmp_path / "b.safetensors")
    path.write_text(json.dumps(config))
    (files.flux / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}))
    with pytest.raises(CheckpointError, match="this is a FluxKontextPipeline"):
        files.convert(tmp_path / "b.safetensors")
    (files.flux / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    files.convert(tmp_path / "b.safetensors")


@pytest.mark.parametrize("damage", ["cut", "count", "magic", "empty", "noise"])
def test_damaged_gguf(damage: str, stored: Tensors, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "flux.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("double_blocks.0.x", np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "count":
        data[8:16] = (2**60).to_bytes(8, "little")
    elif damage == "magic":
        data[:4] = b"JPEG"
    elif damage == "empty":
        data = bytearray()
    else:
        data[24:] = bytes(i * 37 % 256 for i in range(len(data) - 24))
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="GGUF") as caught:
        read_transformer(path, TINY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [0, 1])
def test_gguf_tensors_that_overlap(number: int, tmp_path: Path) -> None:
    """An offset leads into the neighbouring tensor, whose bytes would otherwise be read as this one's."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "flux.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    names = ["double_blocks.0.x", "double_blocks.0.y"]
    for name in names:
        writer.add_tensor(name, np.ones((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    assert data.count(names[number].encode()) == 1
    # Behind a name: the number of dimensions (4 bytes), 2 sizes of 8, the type (4), the offset (8).
    place = data.index(names[number].encode()) + len(names[number]) + 4 + 2 * 8 + 4
    assert int.from_bytes(data[place : place + 8], "little") == 128 * number
    data[place : place + 8] = (32 + 64 * (1 - number)).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="overlaps tensor") as caught:
        read_transformer(path, TINY)
    assert "\n" not in str(caught.value)


# LoRA


def small_lora() -> Tensors:
    """A LoRA of one layer, of rank 3."""
    g = torch.Generator().manual_seed(11)
    return {
        "x_embedder.lora_A.weight": torch.randn(3, TINY.in_channels, generator=g),
        "x_embedder.lora_B.weight": torch.randn(TINY.width, 3, generator=g),
    }


def deltas(path: Path) -> Tensors:
    return {name: branch.up.double() @ branch.down.double() for name, branch in read_adapter(path, TINY).items()}


FUSED = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.1.txt_attn.qkv": [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.1.img_mlp.2": ["transformer_blocks.1.ff.net.2"],
    "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.net.0.proj"],
    "single_blocks.1.linear1": [
        *(f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.1.proj_mlp",
    ],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "img_in": ["x_embedder"],
}


def fused_lora() -> tuple[dict[str, tuple[Tensor, Tensor]], Tensors]:
    """A LoRA of layers as FLUX's own code has them, and what it adds to each layer of the bundle."""
    g, shapes = torch.Generator().manual_seed(3), schema.transformer_tensors(TINY)
    given, expected = {}, {}
    for name, layers in FUSED.items():
        outs = [shapes[f"{layer}.weight"][0] for layer in layers]
        down = torch.randn(3, shapes[f"{layers[0]}.weight"][1], generator=g)
        up = torch.randn(sum(outs), 3, generator=g)
        given[name] = (down, up)
        for layer, part in zip(layers, (up.double() @ down.double()).split(outs), strict=True):
            expected[layer] = part
    return given, expected


SPELLINGS: dict[str, Callable[[str], tuple[str, str, str]]] = {
    "comfyui": lambda n: (f"diffusion_model.{n}.lora_A.weight", f"diffusion_model.{n}.lora_B.weight", ""),
    "kohya": lambda n: (
        f"lora_unet_{n.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{n.replace('.', '_')}.lora_up.weight",
        f"lora_unet_{n.replace('.', '_')}.alpha",
    ),
    "plain": lambda n: (f"{n}.lora.down.weight", f"{n}.lora.up.weight", ""),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lora_of_flux_s_own_layers(spelling: str, tmp_path: Path) -> None:
    given, expected = fused_lora()
    tensors: Tensors = {}
    for name, (down, up) in given.items():
        a, b, alpha = SPELLINGS[spelling](name)
        tensors |= {a: down, b: up}
        if alpha:
            tensors[alpha] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = deltas(tmp_path / "lora.safetensors")
    assert found.keys() == expected.keys()
    scale = 6.0 / 3 if spelling == "kohya" else 1.0
    for layer, delta in expected.items():
        torch.testing.assert_close(found[layer], scale * delta, rtol=1e-5, atol=1e-5)


def test_the_last_modulation_s_halves_change_places(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(4)
    down, up = torch.randn(2, 32, generator=g), torch.randn(64, 2, generator=g)
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    shift, scale = (up.double() @ down.double()).chunk(2)
    torch.testing.assert_close(deltas(tmp_path / "lora.safetensors")["norm_out.linear"], torch.cat([scale, shift]))


def test_xlabs(tmp_path: Path) -> None:
    """XLabs names layers by attention processors, and in single blocks adapts q, k and v alone.

    diffusers' own conversion of these names gives the expected result.
    """
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    g = torch.Generator().manual_seed(5)
    D, tensors = TINY.width, {}
    for key, outs in (
        ("double_blocks.0.processor.qkv_lora1", 3 * D),
        ("double_blocks.0.processor.proj_lora1", D),
        ("double_blocks.1.processor.qkv_lora2", 3 * D),
        ("double_blocks.1.processor.proj_lora2", D),
        ("single_blocks.1.processor.qkv_lora", 3 * D),
    ):
        tensors[f"{key}.down.weight"] = torch.randn(4, D, generator=g)
        tensors[f"{key}.up.weight"] = torch.randn(outs, 4, generator=g)
    save_file(tensors, tmp_path / "lora.safetensors")
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    stems = {n.removeprefix("transformer.").rsplit(".lora_", 1)[0] for n in theirs}
    found = deltas(tmp_path / "lora.safetensors")
    assert found.keys() == stems
    for stem in stems:
        up, down = (theirs[f"transformer.{stem}.lora_{x}.weight"].double() for x in "BA")
        torch.testing.assert_close(found[stem], up @ down)


ADAPTER_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("given", ["folder", "file"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_a_folder_as_peft_saves_it(given: str, stabilised: bool, tiny_files: Files, tmp_path: Path) -> None:
    """The bundle adds to every layer what peft adds, whether the folder or the file in it is given.

    The scale stands in the configuration beside the file.
    """
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=list(LORA_MODULES),
        rank_pattern={r"transformer_blocks\.1\.attn\.to_q": 2},
        alpha_pattern={"proj_mlp": 3, "attn": 5},  # "attn" is no layer's last name, so it matches none
        use_rslora=stabilised,
        init_lora_weights=False,
    )
    model = get_peft_model(FluxTransformer2DModel.from_config(TINY.to_dict()), config)
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / ("" if given == "folder" else "adapter_model.safetensors")
    found = deltas(path)
    assert found.keys() == set(LORA_MODULES)
    for name, delta in found.items():
        expected = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(delta.float(), expected, rtol=1e-4, atol=1e-6)


def write_adapter(folder: Path, config: dict[str, Any], metadata: dict[str, Any] | None = None, **more: Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    text = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(small_lora() | more, folder / "adapter_model.safetensors", text)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Tensor], str]] = {
    "rank": ({"r": 8, "lora_alpha": 8}, None, {}, r"'x_embedder' has rank 3, .*adapter_config\.json says 8"),
    "alpha": (
        {"lora_alpha": 8},
        None,
        {"x_embedder.alpha": torch.tensor(4.0)},
        r"alpha of 'x_embedder' is 4, .* says 8",
    ),
    "header": ({"lora_alpha": 8}, {"lora_alpha": 4}, {}, "contradict each other"),
    "dora": ({"lora_alpha": 8, "use_dora": True}, None, {}, "DoRA"),
    "kind": ({"peft_type": "LOKR"}, None, {}, "peft_type is 'LOKR'"),
    "damaged": ({"lora_alpha": "much"}, None, {}, "damaged"),
    "half_a_rank": ({"lora_alpha": 8, "r": 3.5}, None, {}, "r must be a whole number, got 3.5"),
    "pattern": ({"lora_alpha": 8, "alpha_pattern": {"(": 2}}, None, {}, "damaged"),
    "flags": ({"lora_alpha": 8, "alpha_pattern": {"(?i)x": 2}}, None, {}, "damaged: global flags"),
    "parentheses": ({"lora_alpha": 8, "alpha_pattern": {"x)|(y": 2}}, None, {}, "damaged: unbalanced"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused(name: str, tmp_path: Path) -> None:
    config, metadata, tensors, message = CONTRADICTIONS[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(write_adapter(tmp_path / "a", config, metadata, **tensors), TINY)
    assert "\n" not in str(caught.value)


def test_a_config_beside_a_file_of_another_name_is_not_its_own(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", {"lora_alpha": 30})
    expected = deltas_of(small_lora())
    torch.testing.assert_close(deltas(folder)["x_embedder"], 10 * expected, rtol=1e-5, atol=1e-5)
    (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    torch.testing.assert_close(deltas(folder / "other.safetensors")["x_embedder"], expected)


def deltas_of(tensors: Tensors) -> Tensor:
    return tensors["x_embedder.lora_B.weight"].double() @ tensors["x_embedder.lora_A.weight"].double()


OTHER_ADAPTERS = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "text encoder",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "text encoder",
    "transformer.x_embedder.lora_magnitude_vector": "DoRA",
    "lora_unet_img_in.dora_scale": "DoRA",
    "lora_unet_img_in.lokr_w1": "LoKr",
    "lora_unet_img_in.hada_w1_a": "LoHa",
    "transformer.nowhere.lora_A.weight": "",
}


@pytest.mark.parametrize("key", OTHER_ADAPTERS)
def test_other_adapters_are_named(key: str, tmp_path: Path) -> None:
    extra = {key: torch.ones(3, 64), key.replace("lora_A", "lora_B"): torch.ones(64, 3)}
    save_file(small_lora() | extra, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=OTHER_ADAPTERS[key] or "unexpected LoRA of layer 'nowhere'"):
        read_adapter(tmp_path / "lora.safetensors", TINY)
