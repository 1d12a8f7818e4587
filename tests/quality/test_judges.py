"""Judges open the files that the real ones come in, see what their libraries see, and refuse what they can't use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.multimodal import clip_score

from mogle_rt.errors import CheckpointError, DownloadError, InputError, MogleError
from mogle_rt.masks.classes import CLASS_NAMES
from mogle_rt.masks.orders import ORDERS
from mogle_rt.quality.judges import inception
from mogle_rt.quality.judges.choice import Bench, Judges
from mogle_rt.quality.judges.clip import Clip
from mogle_rt.quality.judges.inception import Inception
from mogle_rt.quality.judges.parser import SegmentationModel, class_table
from mogle_rt.quality.judges.reward import Reward
from mogle_rt.quality.judges.vision import FaceModel, VisionModel
from tests.quality.judges import (
    NAMES,
    inception_weights,
    write_clip,
    write_face_network,
    write_inception,
    write_parser,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def parser_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parser(tmp_path_factory.mktemp("parser"))


def pictures(n: int = 3, side: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, side, side, 3)).astype(np.uint8))


def test_inception_sees_the_same_in_every_form_of_its_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    judge = Inception(write_inception(tmp_path / "w.pth"), CPU)
    seen = judge.features(pictures(side=299))
    assert seen.shape == (3, 12)
    assert (seen.std(0) > 0).sum() > 6  # pictures differ; a few of the features are zero for these weights
    assert [m.shape[:2] for m in judge.maps(pictures(1))] == [(1, 8), (1, 8), (1, 12)]
    last = judge.maps(pictures(1, 299))[-1].mean((2, 3))
    torch.testing.assert_close(last, seen[:1])  # of one picture and of three: other sums, so rounding
    save_file(inception_weights(), tmp_path / "w.safetensors")
    assert torch.equal(Inception(tmp_path / "w.safetensors", CPU).features(pictures(side=299)), seen)


def test_inceptions_first_layer_is_normalised_by_its_statistics(tmp_path: Path) -> None:
    """The rest was compared with torch-fidelity's network by hand: it needs 24 million weights."""
    judge, w = Inception(write_inception(tmp_path / "w.pth"), CPU), inception_weights()
    x = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    y = F.conv2d(x, w["Conv2d_1a_3x3.conv.weight"], stride=2)
    mean, variance, weight, bias = (
        w[f"Conv2d_1a_3x3.bn.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
    )
    want = ((y - mean) / (variance + 0.001).sqrt() * weight + bias).clamp(min=0)
    got = judge._layer(x, "Conv2d_1a_3x3", stride=2, pad=False)
    torch.testing.assert_close(got, want)


def test_inception_is_found_where_other_programs_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert inception.cached_weights() is None
    (tmp_path / "checkpoints").mkdir()
    write_inception(tmp_path / "checkpoints" / inception.FILE)
    assert Bench(Judges(), CPU, of_demo=False).features.name == f"InceptionV3, {inception.FILE}"
    of_torch_fidelity = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    (tmp_path / "checkpoints" / inception.FILE).rename(of_torch_fidelity)
    assert inception.cached_weights() == of_torch_fidelity


def test_clip_score_is_torchmetrics(clip_folder: Path) -> None:
    judge = Clip(str(clip_folder), CPU)
    prompts = ["a man", "a woman with long hair", "red"]
    texts, cut = judge.texts(prompts)
    scores = 100 * (judge.features(pictures()) * texts).sum(1)
    model: Any = judge._model
    # torchmetrics expects the tensors that transformers 4 returned here.
    old: Any = SimpleNamespace(
        config=model.config,
        to=lambda _: old,
        get_image_features=lambda x: model.get_image_features(x).pooler_output,
        get_text_features=lambda i, m: model.get_text_features(i, m).pooler_output,
    )
    for picture, prompt, score in zip(pictures(), prompts, scores, strict=True):
        tensor = torch.from_numpy(picture).permute(2, 0, 1)
        want = clip_score(tensor, prompt, lambda: (old, judge._processor))
        assert float(score.clamp(min=0)) == pytest.approx(float(want), abs=1e-3)
    assert cut == 0
    assert judge.texts(["a man with a hat and a woman with long hair " * 3])[1] == 1  # of more than 12 tokens


def test_clip_embeddings_have_length_1(clip_folder: Path) -> None:
    judge = Clip(str(clip_folder), CPU)
    torch.testing.assert_close(judge.features(pictures()).norm(dim=1), torch.ones(3))
    assert [m.shape for m in judge.maps(pictures())] == [(3, 16, 16)] * 2


def test_an_image_model_pools(clip_folder: Path) -> None:
    judge = VisionModel(str(clip_folder), CPU, "--features")
    assert judge.features(pictures()).shape == (3, 16)
    assert judge.maps(pictures())[0].shape == (3, 16, 17)


def test_a_parsers_classes_become_the_19(parser_folder: Path) -> None:
    judge = SegmentationModel(str(parser_folder), CPU)
    found = judge.labels([*pictures(2), pictures(1, 48)[0]])
    assert [labels.shape for labels in found] == [(32, 32), (32, 32), (48, 48)]
    bisenet = SegmentationModel(str(parser_folder), CPU, "bisenet").labels(pictures(1))[0]
    number = {CLASS_NAMES.index(name): i for i, name in enumerate(CLASS_NAMES)}
    as_numbers = np.vectorize(number.get)(found[0])
    assert [ORDERS["bisenet"][n] for n in np.unique(as_numbers)] == [CLASS_NAMES[c] for c in dict.fromkeys(
        bisenet.ravel()[np.unique(as_numbers, return_index=True)[1]])]  # fmt: skip


def test_a_class_table_takes_names_orders_and_a_map() -> None:
    names = dict(enumerate(NAMES))
    assert class_table(names, None).tolist() == list(range(19))
    assert class_table(names, "celebamask").tolist() == list(range(19))
    assert class_table({0: "bg", 1: "beard"}, {"bg": "background", "beard": "skin"}).tolist() == [0, 1]
    for given, message in (
        (None, "classes bg are none of the 19"),
        ({"bg": "sky"}, "'sky' is none of background"),
        ({"sky": "background"}, "names 'sky', which is no class of the parser: bg, skin"),
        ("farl", "must be celebamask"),
    ):
        with pytest.raises(InputError, match=message):
            class_table({0: "bg", 1: "skin"}, given)


@pytest.mark.parametrize("batch", ["n", 1])
def test_a_face_network_is_an_onnx_file(tmp_path: Path, batch: int | str) -> None:
    judge = FaceModel(write_face_network(tmp_path / "f.onnx", batch=batch), "--face")
    white, left = np.full((16, 16, 3), 255, np.uint8), np.zeros((16, 16, 3), np.uint8)
    left[:, :8] = 255
    seen = judge.features([white, left, white])
    assert float(seen[0] @ seen[2]) == pytest.approx(1)
    assert float(seen[0] @ seen[1]) == pytest.approx(0, abs=1e-6)  # half of it has the opposite sign


def test_image_reward_is_asked_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package works with older releases of transformers alone; a stand-in shows how it is called."""
    told: dict[str, Any] = {}

    def load(**options: Any) -> Any:
        told.update(options)
        print("load checkpoint")
        return SimpleNamespace(score=lambda prompt, image: len(prompt) + image.width)

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    with pytest.raises(CheckpointError, match=r"has no ImageReward\.pt"):
        Reward(str(tmp_path), CPU)
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).write_text("")
    assert Reward(str(tmp_path), CPU).scores(pictures(2), ["a", "abc"]).tolist() == [33, 35]
    assert told == {
        "name": str(tmp_path / "ImageReward.pt"),
        "med_config": str(tmp_path / "med_config.json"),
        "device": CPU,
    }
    Reward(None, CPU)
    assert told["name"] == "ImageReward-v1.0"


class Danger:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("danger"),))


def bad_judges(folder: Path) -> list[tuple[Judges, str, type[MogleError], str]]:
    """Judges that can't be opened, which of them is asked, and what the error says."""
    (folder / "text.pth").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, folder / "other.pth")
    torch.save({"a": Danger()}, folder / "danger.pth")
    torch.save([torch.zeros(1)], folder / "list.pth")
    torch.jit.script(torch.nn.Linear(1, 1)).save(folder / "script.pt")
    (folder / "no.onnx").write_text("no network")
    write_face_network(folder / "grey.onnx", channels=1)
    (folder / "empty").mkdir()
    (folder / "remote").mkdir()
    (folder / "remote" / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})
    )
    (folder / "remote" / "mine.py").write_text(f"open({str(folder / 'danger')!r}, 'w')")
    write_parser(folder / "parser")
    return [
        (Judges(features=str(folder / "absent.pth")), "features", CheckpointError, "no such file"),
        (Judges(features=str(folder / "text.pth")), "features", CheckpointError, "can't be read as weights"),
        (Judges(features=str(folder / "other.pth")), "features", CheckpointError, "is no InceptionV3 as FID has it"),
        (Judges(features=str(folder / "danger.pth")), "features", CheckpointError, "can't be read as weights"),
        (
            Judges(features=str(folder / "list.pth")),
            "features",
            CheckpointError,
            "must hold tensors by name, holds list",
        ),
        (Judges(features=str(folder / "script.pt")), "features", CheckpointError, "is TorchScript, which holds code"),
        (Judges(clip=str(folder / "empty")), "clip", CheckpointError, "--clip"),
        (Judges(clip=str(folder / "absent")), "clip", CheckpointError, "no such folder; give a folder of a model"),
        (Judges(clip=str(folder / "parser")), "clip", CheckpointError, "is a segformer model; needed is clip"),
        (Judges(clip=str(folder / "remote")), "clip", CheckpointError, "can't be opened"),
        (Judges(clip="owner/name"), "clip", DownloadError, "hf download owner/name --local-dir FOLDER"),
        (Judges(), "clip", DownloadError, "hf download openai/clip-vit-large-patch14-336"),
        (Judges(), "parser", DownloadError, "hf download jonathandinu/face-parsing"),
        (Judges(face=str(folder / "no.onnx")), "face", CheckpointError, "can't be opened as ONNX"),
        (Judges(face=str(folder / "grey.onnx")), "face", CheckpointError, r"must have one input \[n, 3, side, side\]"),
        (
            Judges(parser_classes={"skin": "sky"}, parser=str(folder / "parser")),
            "parser",
            InputError,
            "'sky' is none of",
        ),
    ]


def test_what_is_no_judge_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for judges, which, kind, message in bad_judges(tmp_path):
        bench = Bench(judges, CPU, of_demo=False)
        for _ in range(2):  # the second time from memory
            with pytest.raises(kind, match=message) as caught:
                getattr(bench, which)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "danger").exists()  # no file's code was run


def test_missing_weights_of_inception_say_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        DownloadError, match=r"fetch https://github\.com/mseitzer/pytorch-fid/\S+ and give it as --features"
    ):
        _ = Bench(Judges(), CPU, of_demo=False).features
    assert Bench(Judges(), CPU, of_demo=True).features.name == "demo"
