"""Prompts as embeddings in a file, so that an image can be drawn where the text encoders have no room.

The file is a safetensors file with ``prompt_embeds`` [N, T, J] of T5 and ``pooled_prompt_embeds`` [N, P] of CLIP, the
arguments of a pipeline's call. Its metadata holds the prompts, and the hash of the bundle that embedded them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mogle_rt.bundle.files import atomic_write
from mogle_rt.errors import InputError
from mogle_rt.values import parsed, read_json

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "mogle_rt prompts"
NAMES = ("prompt_embeds", "pooled_prompt_embeds")


@dataclass(frozen=True)
class EmbeddedPrompts:
    """What a file of embeddings says of itself.

    Attributes:
        path: the file.
        prompts: their texts, in the order of the embeddings.
        bundle: the hash of the bundle whose text encoders embedded them.
        tokens: the number of T5 tokens, T.
    """

    path: Path
    prompts: tuple[str, ...]
    bundle: str
    tokens: int

    @classmethod
    def read(cls, path: Path) -> EmbeddedPrompts:
        """Read the file's header. PyTorch is not needed.

        Raises:
            InputError: there is no such file, or `mogle-rt embed` didn't write it.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                metadata, shapes = file.metadata() or {}, [file.get_slice(name).get_shape() for name in NAMES]
            prompts = parsed(tuple[str, ...], read_json(metadata.get("prompts", "[]")), "prompts")
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path}: no such file") from None
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{path}: holds no embeddings of prompts: {' '.join(str(error).split())}") from None
        counts = {len(prompts), *(shape[0] for shape in shapes if shape)}
        if metadata.get("format") != FORMAT or not prompts or len(counts) > 1 or len(shapes[0]) != 3:
            raise InputError(f"{path}: holds no embeddings of prompts; `mogle-rt embed` writes them")
        return cls(path, prompts, metadata.get("bundle", ""), shapes[0][1])

    def prompts_of_masks(self, given: Sequence[str] | None, found: Sequence[str]) -> list[str]:
        """The prompt of each mask, all of which are in the file.

        Args:
            given: the prompts that were asked for, one for each mask; None where none were.
            found: the texts that belong to the masks.

        Returns:
            What was asked for; else the masks' texts; else the file's only prompt, or its prompts in their order.

        Raises:
            InputError: a prompt is not in the file, or the file has another number of prompts than there are masks.
        """
        if given is None and not set(found) <= set(self.prompts):
            if len(self.prompts) not in (1, len(found)):
                raise InputError(
                    f"{self.path}: holds {len(self.prompts)} prompts for {len(found)} masks; give one, or one for each "
                    "mask in their order, or say with --prompt which ones to take"
                )
            return list(self.prompts) * (len(found) if len(self.prompts) == 1 else 1)
        for prompt in found if given is None else given:
            if prompt not in self.prompts:
                raise InputError(f"{self.path}: holds no embedding of {prompt!r}; `mogle-rt embed` makes one")
        return list(found if given is None else given)

    def load(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The embeddings by prompt: T5's [T, J] and CLIP's [P]."""
        from safetensors.torch import load_file

        tensors = load_file(self.path)
        return dict(zip(self.prompts, zip(*(tensors[name] for name in NAMES), strict=True), strict=True))


def write_embeddings(path: Path, prompts: Sequence[str], sequence: Tensor, pooled: Tensor, bundle: str) -> None:
    """Write a file that `EmbeddedPrompts` reads.

    Args:
        path: replaced if it is there.
        prompts: N texts.
        sequence, pooled: [N, T, J] of T5 and [N, P] of CLIP.
        bundle: the hash of the bundle that embedded them.

    Raises:
        OutputError: the file can't be written.
    """
    from safetensors.torch import save

    tensors = {name: value.cpu().contiguous() for name, value in zip(NAMES, (sequence, pooled), strict=True)}
    content = save(tensors, {"format": FORMAT, "prompts": json.dumps(list(prompts)), "bundle": bundle})
    with atomic_write(path) as file:
        file.write(content)
