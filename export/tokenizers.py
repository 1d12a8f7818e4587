"""The tokenizers of the text encoders as files that the `tokenizers` library reads in any of its languages."""

from __future__ import annotations

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.encoders.tokenizers import load_tokenizer

FILES = {"tokenizer": "tokenizer.json", "tokenizer_2": "tokenizer_2.json"}  # CLIP's and T5's


def tokenizer_files(bundle: Bundle) -> dict[str, bytes]:
    """CLIP's tokenizer and then T5's: the contents of their files, by name.

    The files themselves say how far a text is padded, and where it is cut, so that whoever reads them gets the same tokens
    as `mogle_rt.encoders.text`.

    Raises:
        CheckpointError: the tokenizers can't be read.
    """
    clip = bundle.config.text_encoder or {}
    lengths = {"tokenizer": clip.get("max_position_embeddings", 77), "tokenizer_2": bundle.default_text_tokens}
    files = {}
    for part, name in FILES.items():
        tokenizer = load_tokenizer(part, bundle.files(part))
        tokenizer("", padding="max_length", max_length=lengths[part], truncation=True)  # leaves both in its backend
        files[name] = tokenizer.backend_tokenizer.to_str(pretty=True).encode() + b"\n"
    return files
