"""Train the demo checkpoint's text encoders: small CLIP and T5 models that tell every attribute from a caption.

    python -m examples.demo_checkpoint.train_text --data build/demo/train --output build/demo/text

A diffusion model with so little time would spend most of it on learning to read. So the encoders learn to read first, in
minutes, from captions alone: linear heads on CLIP's pooled vector, and heads that pool T5's tokens by attention, tell
each attribute, or that the caption does not name it. Then the heads are thrown away, and the encoders are frozen.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo_checkpoint.attributes import Attributes, describe, reword
from examples.demo_checkpoint.muon import Muon
from examples.demo_checkpoint.renders import Renders
from examples.demo_checkpoint.training import Clock, learning_rate
from mogle_rt.encoders.tokenizers import load_tokenizer

TOKENS = 48  # T5's, which is the most that a prompt may have
WIDTH = 128  # of both encoders
LR = 4e-3
NAMES = (
    "sex", "age", "skin", "hair_style", "hair", "fringe", "eyes", "beard", "lips", "glasses", "hat", "earrings",
    "necklace", "smile", "mouth_open", "clothes", "background", "looks",
)  # fmt: skip


def write_clip_tokenizer(folder: Path, texts: list[str]) -> int:
    """Write vocab.json and merges.txt in the form of CLIP's published tokenizer. Returns the size of the vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, end_of_word_suffix="</w>"))
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{x}</w>" for x in letters] + ["".join(m) for m in merges]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | {"pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    )
    return len(words)


def write_t5_tokenizer(folder: Path, texts: list[str]) -> int:
    """Write tokenizer.json in the form of T5's published tokenizer. Returns the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for text in texts for word in re.findall(r"[\w-]+", text)})
    letters = [chr(c) for c in range(33, 127)]
    special = ["<pad>", "</s>", "<unk>"]
    # Every known word is one token, so is every punctuation mark, and unknown words are spelled letter by letter.
    pieces = [(f"▁{w}", -1.0) for w in words] + [(x, -4.0 if x in ",.;:!?" else -12.0) for x in ["▁", *letters]]
    tokenizer = Tokenizer(models.Unigram([(s, 0.0) for s in special] + pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(names | {"model_max_length": TOKENS, "extra_ids": 0, "tokenizer_class": "T5Tokenizer"})
    )
    return tokenizer.get_vocab_size()


def make_encoders(clip_words: int, t5_words: int) -> tuple[Any, Any]:
    """Make untrained CLIP and T5 encoders."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_words,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=clip_words - 2,
            eos_token_id=clip_words - 1,
            pad_token_id=clip_words - 1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_words,
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    return clip, t5


class Reader:
    """Tokenizers and encoders from the folders of a FLUX checkpoint: prompts to embeddings, as the runtime makes them."""

    def __init__(self, folder: Path, encoders: tuple[Any, Any] | None = None) -> None:
        from transformers import CLIPTextModel, T5EncoderModel

        def files(part: str) -> dict[str, bytes]:
            return {p.name: p.read_bytes() for p in (folder / part).iterdir()}

        self.tokenizers = [load_tokenizer(part, files(part)) for part in ("tokenizer", "tokenizer_2")]
        self.clip, self.t5 = encoders or (
            CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
            T5EncoderModel.from_pretrained(folder / "text_encoder_2").float(),
        )

    def ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """CLIP's [B, 77] and T5's [B, TOKENS]."""
        lengths = (77, TOKENS)
        made = [
            t(texts, padding="max_length", truncation=True, max_length=n, return_tensors="pt").input_ids
            for t, n in zip(self.tokenizers, lengths, strict=True)
        ]
        return made[0], made[1]

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """T5's sequence [B, TOKENS, J] and CLIP's pooled vector [B, P]."""
        clip_ids, t5_ids = self.ids(texts)
        last = int(
            (clip_ids == clip_ids[0, -1]).int().argmax(1).max()
        )  # CLIP is causal, so what comes after the end mark does not matter
        clip_ids = clip_ids[:, : last + 1]
        return self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output


class Heads(nn.Module):
    """Tells attributes from embeddings: from the pooled vector, and from the tokens that each attribute's query picks."""

    def __init__(self, values: dict[str, list[str]]) -> None:
        super().__init__()
        self.values = values
        counts = [1 + len(v) for v in values.values()]  # one more, for an attribute that is not named
        self.pooled = nn.ModuleList(nn.Linear(WIDTH, n) for n in counts)
        self.picked = nn.ModuleList(nn.Linear(WIDTH, n) for n in counts)
        self.queries = nn.Parameter(torch.randn(len(counts), WIDTH) / WIDTH**0.5)

    def forward(self, sequence: Tensor, pooled: Tensor) -> list[tuple[Tensor, Tensor]]:
        weights = torch.einsum("btj,aj->bat", sequence, self.queries).softmax(-1)
        picked = weights @ sequence  # [B, attributes, J]
        return [(p(pooled), q(picked[:, i])) for i, (p, q) in enumerate(zip(self.pooled, self.picked, strict=True))]

    def targets(self, named: list[dict[str, str]]) -> Tensor:
        """[B, attributes]: 0 where not named."""
        rows = [[1 + v.index(n[a]) if a in n else 0 for a, v in self.values.items()] for n in named]
        return torch.tensor(rows)


def captions(attributes: list[Attributes], rng: np.random.Generator) -> tuple[list[str], list[dict[str, str]]]:
    """A new caption for each picture, a few of them empty, and what each names."""
    texts, named = [], []
    for a in attributes:
        text, said = describe(a, rng, keep=rng.choice([0.82, 0.5, 0.25]))
        empty = rng.random() < 0.03
        texts.append("" if empty else reword(text, rng))
        named.append({} if empty else said)
    return texts, named


def train(data: Renders, output: Path, minutes: float) -> None:
    """Make tokenizers and encoders, train these, and save all as parts of a FLUX checkpoint in fp16."""
    rng = np.random.default_rng(0)
    people = [Attributes(**a) for a in data.attributes]
    corpus = [reword(text, rng) for row in data.captions for text in row]
    values = {name: sorted({_value(a, name) for a in people} - {""}) for name in NAMES}
    torch.manual_seed(0)
    if (output / "text_encoder").exists():  # an earlier training goes on
        reader = Reader(output)
    else:
        words = write_clip_tokenizer(output / "tokenizer", corpus), write_t5_tokenizer(output / "tokenizer_2", corpus)
        reader = Reader(output, make_encoders(*words))
    heads = Heads(values)
    lengths = (reader.ids(corpus[:3000])[1] != 0).sum(1).float()
    print(f"T5 tokens: mean {lengths.mean():.1f}, cut {float((lengths == TOKENS).float().mean()):.3f}")
    parameters = [*reader.clip.parameters(), *reader.t5.parameters(), *heads.parameters()]
    tables = [
        p for model in (reader.clip, reader.t5) for n, p in model.named_parameters() if "embed" in n or "bias" in n
    ]
    optimizer = Muon(parameters, lr=LR, weight_decay=0.01, adam=[*tables, *heads.parameters(), reader.t5.shared.weight])
    torch.set_num_threads(1)
    clock, step, done = Clock(minutes * 60), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = LR * learning_rate(done, step, warm_up=30, constant=0.3) * (1 if group["muon"] else 0.5)
        texts, named = captions([people[i] for i in rng.integers(0, len(people), 48)], rng)
        loss, right = score(reader, heads, texts, named)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        done = clock.tick()
        if step % 50 == 0:
            print(f"{step} {clock.elapsed:.0f}s loss {float(loss.detach()):.4f} right {right}", flush=True)
    for part, model in (("text_encoder", reader.clip), ("text_encoder_2", reader.t5)):
        model.half().save_pretrained(output / part)


def score(reader: Reader, heads: Heads, texts: list[str], named: list[dict[str, str]]) -> tuple[Tensor, list[float]]:
    """The loss, and the shares of attributes that are told correctly from the pooled vector and from the tokens."""
    goal = heads.targets(named)
    loss, right = torch.zeros(()), torch.zeros(2)
    for i, pair in enumerate(heads(*reader(texts))):
        for k, logits in enumerate(pair):
            loss = loss + F.cross_entropy(logits, goal[:, i])
            right[k] += (logits.argmax(-1) == goal[:, i]).float().mean() / len(heads.values)
    return loss / len(heads.values), [round(float(r), 4) for r in right]


def _value(a: Attributes, name: str) -> str:
    value = getattr(a, name)
    return "" if value in (None, False) else "yes" if value is True else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo/train"))
    parser.add_argument("--output", type=Path, default=Path("build/demo/text"))
    parser.add_argument("--minutes", type=float, default=4)
    args = parser.parse_args()
    train(Renders(args.data), args.output, args.minutes)


if __name__ == "__main__":
    main()
