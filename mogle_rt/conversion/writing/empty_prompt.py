"""The embeddings of the empty prompt, for a bundle without text encoders: with them it draws from masks alone.

T5 is the largest of the two encoders (9.5 GB in bfloat16). So its weights are read layer by layer while it computes, and
each layer's weights are freed after it. The computation is in float32, whatever the weights are stored in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mogle_rt.config import MAX_TEXT_TOKENS
from mogle_rt.conversion.folders import read_json
from mogle_rt.conversion.tensors import HeldTensor, SourceTensor
from mogle_rt.encoders.text_models import empty_t5, load_text_encoder
from mogle_rt.encoders.tokenizers import load_tokenizer
from mogle_rt.errors import CheckpointError
from mogle_rt.torch_api.settings import settled

SHARED = "shared.weight"  # T5's embedding, which its encoder has under another name


@settled()
@torch.no_grad()
def empty_prompt(
    flux: Path,
    clip: Mapping[str, SourceTensor],
    t5: Mapping[str, SourceTensor],
    files: Mapping[str, Mapping[str, bytes]],
) -> dict[str, SourceTensor]:
    """Embed the empty prompt as a pipeline does.

    Args:
        flux: the folder with the encoders' configurations.
        clip, t5: the encoders' weights.
        files: the files of "tokenizer" and "tokenizer_2", by name.

    Returns:
        ``prompt_embeds`` [T, J] and ``pooled_prompt_embeds`` [P] in float32; T is what T5's tokenizer says, at most 512.

    Raises:
        CheckpointError: a configuration or a tokenizer can't be read.
    """
    weights = {name: tensor.load().float() for name, tensor in clip.items()}
    encoder = load_text_encoder("text_encoder", read_json(flux / "text_encoder" / "config.json"), weights)
    tokenizer, tokenizer_2 = (load_tokenizer(part, files[part]) for part in ("tokenizer", "tokenizer_2"))
    length = encoder.config.max_position_embeddings
    pooled = encoder(_tokens(tokenizer, length)).pooler_output[0]
    model = empty_t5(read_json(flux / "text_encoder_2" / "config.json"), torch.float32)
    for prefix, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            _read_when_used(module, prefix, t5)
    sequence = model(_tokens(tokenizer_2, min(int(tokenizer_2.model_max_length), MAX_TEXT_TOKENS)))[0][0]
    return {"prompt_embeds": HeldTensor(sequence), "pooled_prompt_embeds": HeldTensor(pooled)}


def _tokens(tokenizer: Any, length: int) -> torch.Tensor:
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    ids = tokenizer([""], **options).input_ids
    assert isinstance(ids, torch.Tensor)
    return ids


def _read_when_used(module: nn.Module, prefix: str, tensors: Mapping[str, SourceTensor]) -> None:
    """Let a module of the meta device have its weights while it computes, and only then."""
    empty = dict(module.named_parameters(recurse=False))

    def read(*_: object) -> None:
        for name in empty:
            full = f"{prefix}.{name}"
            source = tensors.get(full) or tensors.get(SHARED if "embed_tokens" in full else full)
            if source is None:
                raise CheckpointError(f"text_encoder_2: missing tensor {full!r}")
            setattr(module, name, nn.Parameter(source.load().float(), requires_grad=False))

    def free(*_: object) -> None:
        for name, parameter in empty.items():
            setattr(module, name, parameter)

    module.register_forward_pre_hook(read)
    module.register_forward_hook(free)
