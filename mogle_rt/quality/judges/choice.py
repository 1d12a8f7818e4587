"""Which judges there are, and opening those that are asked for, each of them once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mogle_rt.errors import DownloadError, MogleError
from mogle_rt.quality.judges import clip, demo, inception, parser
from mogle_rt.quality.judges.clip import Clip
from mogle_rt.quality.judges.contract import FeatureJudge, Parser
from mogle_rt.quality.judges.demo import DemoJudge
from mogle_rt.quality.judges.inception import Inception
from mogle_rt.quality.judges.parser import SegmentationModel
from mogle_rt.quality.judges.reward import Reward
from mogle_rt.quality.judges.vision import FaceModel, VisionModel

FACE = "--face"
FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Where the judges' weights are; None takes the default.

    Attributes:
        features: of FID, KID and diversity: InceptionV3's weights as a file, a folder or hub id of an image model, or
            "demo". Default: InceptionV3 where pytorch-fid or torch-fidelity keeps it, or the demo's for the demo's images.
        clip: a folder or hub id.
        parser: a folder or hub id of a segmentation model, or "demo". Default: the demo's for the demo's images.
        parser_classes: see `judges.parser.class_table`.
        face: an ONNX file, or a folder or hub id of an image model. Default: CLIP's embeddings stand in.
        reward: a folder of ImageReward's files.
    """

    features: str | None = None
    clip: str | None = None
    parser: str | None = None
    parser_classes: str | Mapping[str, str] | None = None
    face: str | None = None
    reward: str | None = None

    def __post_init__(self) -> None:
        for name in ("features", "clip", "parser", "face", "reward"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, str(value))  # a path


class Bench:
    """The judges of one evaluation. Each is opened when it is first asked for.

    Args:
        judges: where they are.
        device: to compute on.
        of_demo: whether the images are the demo's, for which the demo has a judge of its own.

    Raises (each property):
        CheckpointError, DownloadError, InputError: a judge's weights can't be had, or are of another kind.
    """

    def __init__(self, judges: Judges, device: torch.device, *, of_demo: bool) -> None:
        self._judges, self._device, self._of_demo = judges, device, of_demo
        self._opened: dict[str, Any] = {}

    @property
    def demo(self) -> DemoJudge:
        return self._once("demo", DemoJudge)

    @property
    def features(self) -> FeatureJudge:
        return self._once("features", self._open_features)

    @property
    def clip(self) -> Clip:
        return self._once("clip", lambda: Clip(self._judges.clip or clip.DEFAULT, self._device))

    @property
    def parser(self) -> Parser:
        return self._once("parser", self._open_parser)

    @property
    def face(self) -> Any:
        return self._once("face", self._open_face)

    @property
    def reward(self) -> Reward:
        return self._once("reward", lambda: Reward(self._judges.reward, self._device))

    def open_given(self) -> None:
        """Open the judges whose place was given, so that a mistake in it is not taken for a metric that lacks its judge."""
        for name in ("features", "clip", "parser", "face", "reward"):
            if getattr(self._judges, name) is not None:
                getattr(self, name)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What was made the first time; or the error again, without another attempt at the hub."""
        if name not in self._opened:
            try:
                self._opened[name] = make()
            except MogleError as error:
                self._opened[name] = error
        if isinstance(found := self._opened[name], MogleError):
            raise found
        return found

    def _open_features(self) -> FeatureJudge:
        spec = self._judges.features or (demo.NAME if self._of_demo else None)
        if spec == demo.NAME:
            return self.demo
        if spec is None:
            found = inception.cached_weights()
            if found is None:
                raise DownloadError(
                    f"FID's InceptionV3 is not on this machine; fetch {inception.ADDRESS} and give it as "
                    f"{inception.OPTION} {inception.FILE}"
                )
            return Inception(found, self._device)
        path = Path(spec).expanduser()
        if path.is_file() or path.suffix in FILES:
            return Inception(path, self._device)
        return VisionModel(spec, self._device, inception.OPTION)

    def _open_parser(self) -> Parser:
        spec = self._judges.parser or (demo.NAME if self._of_demo else parser.DEFAULT)
        return self.demo if spec == demo.NAME else SegmentationModel(spec, self._device, self._judges.parser_classes)

    def _open_face(self) -> Any:
        spec = self._judges.face
        if spec is None:
            return self.clip
        path = Path(spec).expanduser()
        return FaceModel(path, FACE) if path.suffix == ".onnx" else VisionModel(spec, self._device, FACE)
