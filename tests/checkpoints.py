"""Random Face-MoGLE checkpoints of any shape, laid out as the reference's users hold their files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import mogle_rt
from mogle_rt.bundle import schema
from mogle_rt.config import MogleConfig, TransformerConfig

TINY = TransformerConfig(
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=16,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SENTENCES = (
    "a young woman with long blond hair, blue eyes and red lips, smiling",
    "an old man with a grey beard, glasses and a green hat, before a white wall",
    "she is wearing lipstick, earrings and a necklace; he has straight black hair and brown skin",
)


@dataclass
class Files:
    """Where the parts of a checkpoint lie."""

    folder: Path
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def flux(self) -> Path:
        return self.folder / "flux"

    @property
    def lora(self) -> Path:
        return self.folder / "pytorch_lora_weights.safetensors"

    @property
    def mogle(self) -> Path:
        return self.folder / "mogle.pt"

    def convert(self, output: Path, **options: Any) -> Path:
        """Convert these files to a bundle; its path is returned."""
        return mogle_rt.convert(self.flux, self.lora, self.mogle, output, progress=False, **options)


def random_tensors(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of a size that keeps activations near 1; norms near 1; biases small."""
    result = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            result[name] = 1 + 0.1 * noise if "norm" in name.split(".")[-2] and name.endswith("weight") else 0.1 * noise
        else:
            result[name] = noise / max(1, noise[0].numel()) ** 0.5
    return result


def write_checkpoint(
    folder: Path,
    config: TransformerConfig = TINY,
    *,
    mogle: MogleConfig | None = None,
    seed: int = 0,
    rank: int = 4,
    text_encoders: bool = False,
    vae: dict[str, Any] = VAE,
    dtype: torch.dtype = torch.float32,
) -> Files:
    """Write a random checkpoint as a diffusers folder, a LoRA file and a MoGLE pickle."""
    g = torch.Generator().manual_seed(seed)
    files = Files(folder)

    def store(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.to(dtype) for n, t in tensors.items()}, path)

    def store_config(part: str, name: str, values: dict[str, Any]) -> None:
        (files.flux / part).mkdir(parents=True, exist_ok=True)
        (files.flux / part / name).write_text(json.dumps(values))

    store(
        files.flux / "transformer" / "diffusion_pytorch_model.safetensors",
        random_tensors(schema.transformer_tensors(config), g),
    )
    store_config("transformer", "config.json", {"_class_name": "FluxTransformer2DModel"} | config.to_dict())
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    store(files.flux / "vae" / "diffusion_pytorch_model.safetensors", AutoencoderKL.from_config(vae).state_dict())
    store_config("vae", "config.json", vae)
    store_config("scheduler", "scheduler_config.json", SCHEDULER)
    ranks = dict.fromkeys(schema.lora_modules(config), rank)
    lora = random_tensors(schema.lora_tensors(config, ranks), g)
    store(files.lora, {f"transformer.{n}": t for n, t in lora.items()})
    torch.save(random_tensors(schema.mogle_tensors(mogle or MogleConfig()), g), files.mogle)
    if text_encoders:
        write_text_encoders(files.flux, config, seed=seed, dtype=dtype)
    return files


def write_text_encoders(flux: Path, config: TransformerConfig, *, seed: int, dtype: torch.dtype) -> None:
    """Tiny CLIP and T5 encoders with tokenizers trained on a few sentences, in transformers' formats."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_words = write_clip_tokenizer(flux / "tokenizer")
    t5_words = write_t5_tokenizer(flux / "tokenizer_2")
    torch.manual_seed(seed)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_words,
            hidden_size=config.pooled_projection_dim,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=clip_words - 2,
            eos_token_id=clip_words - 1,
            pad_token_id=clip_words - 1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_words,
            d_model=config.joint_attention_dim,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    for part, model in (("text_encoder", clip), ("text_encoder_2", t5)):
        model.to(dtype).save_pretrained(flux / part)


def write_clip_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt, as CLIP's published tokenizer has them. Returns the vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=160, end_of_word_suffix="</w>"))
    model = json.loads(tokenizer.to_str())["model"]
    letters = [chr(c) for c in range(33, 127)]
    merges = [tuple(m) for m in model["merges"]]
    words = letters + [f"{x}</w>" for x in letters] + ["".join(m) for m in merges]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | {"pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    )
    return len(words)


def write_t5_tokenizer(folder: Path) -> int:
    """tokenizer.json, as T5's published tokenizer has it. Returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(names | {"model_max_length": 512, "extra_ids": 0, "tokenizer_class": "T5Tokenizer"})
    )
    return tokenizer.get_vocab_size()
