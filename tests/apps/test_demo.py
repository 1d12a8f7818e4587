"""The checkpoint in the package is whole, draws what mask and prompt say, and can be trained further."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.quality_measures import Cases as QualityCases
from benchmarks.quality_measures import draw, grow
from examples.demo import longer_hair
from examples.demo_checkpoint.attributes import COLOURS, Attributes, describe
from examples.demo_checkpoint.export import export, read_weights, unpack
from examples.demo_checkpoint.latents import BLACK, WHITE
from examples.demo_checkpoint.model import CONFIG, FaceMogle, load_parts, to_parts
from examples.demo_checkpoint.muon import Muon, orthogonalise
from examples.demo_checkpoint.shards import Batch
from examples.demo_checkpoint.train import DROPPED, NO_MASK, SHIFT, GuidedLoss, drop_masks, noise_levels
from examples.demo_checkpoint.training import Average, Clock, learning_rate, save_state
from mogle_rt import Pipeline
from mogle_rt.apps.cli import app
from mogle_rt.bundle import shipped as demo
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.encoders.tokenizers import load_tokenizer
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import InputError
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.masks import to_labels
from mogle_rt.quality.drift import psnr_outside
from mogle_rt.quality.judges.colours import ColourJudge, region_colour
from mogle_rt.quality.judges.demo import DemoJudge
from mogle_rt.quality.regions import face_like, iou
from tests.conftest import assert_close

STEPS = 14
MIOU, COLOUR_SHARE = 0.5, 0.7  # at least, of the committed weights at STEPS steps


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def cases() -> QualityCases:
    """The package's examples, with the colours that the words of their prompts name."""
    shown = demo.examples()
    labels = np.stack([to_labels(e.mask) for e in shown])
    return QualityCases(np.zeros((*labels.shape, 3), np.uint8), labels, [e.prompt for e in shown], [{} for _ in shown])


@pytest.fixture(scope="module")
def drawn(pipe: Pipeline, cases: QualityCases) -> np.ndarray:
    with torch.no_grad():
        return draw(pipe, cases, STEPS, seed=1)[0]


def test_the_bundle_is_what_its_hash_says() -> None:
    assert demo.BUNDLE.stat().st_size < 48e6
    Bundle("demo").verify()


def test_its_own_size_and_text_length(pipe: Pipeline) -> None:
    assert (pipe.bundle.default_size, pipe.bundle.default_text_tokens) == (128, 48)
    image = pipe(None, "a man", num_inference_steps=1).images[0]
    assert image.size == (128, 128)
    assert pipe(None, "a man", num_inference_steps=1, height=64, width=96).images[0].size == (96, 64)


def test_other_bundles_keep_512(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    assert (bundle.default_size, bundle.default_text_tokens) == (512, 512)


def test_images_follow_the_mask(drawn: np.ndarray, cases: QualityCases) -> None:
    found = np.stack(DemoJudge().labels(list(drawn)))
    by_class = iou(found, cases.labels)
    assert float(np.mean(list(by_class.values()))) > MIOU
    assert np.mean([face_like(one) for one in found]) >= 0.75
    shuffled = iou(found, np.roll(cases.labels, 1, 0))
    assert np.mean(list(shuffled.values())) < np.mean(list(by_class.values())) - 0.05


def test_images_follow_the_prompt(pipe: Pipeline, cases: QualityCases) -> None:
    """With one mask and one seed, prompts name five backgrounds and clothes. Most are drawn in the named colour."""
    judge, labels, right = ColourJudge(), cases.labels[4], []
    colours = ["red", "green", "blue", "yellow", "white", "black"]
    pairs = list(zip(colours, colours[1:] + colours[:1], strict=True))
    prompts = [f"a young woman, wearing a {c} shirt, on a {b} background" for b, c in pairs]
    some = QualityCases(cases.images[: len(pairs)], np.stack([labels] * len(pairs)), prompts, [{}] * len(pairs))
    for image, (background, clothes) in zip(draw(pipe, some, STEPS, seed=1)[0], pairs, strict=True):
        for attribute, name in (("background", background), ("clothes", clothes)):
            colour = region_colour(image, labels, attribute)
            assert colour is not None
            right.append(judge.name(colour, attribute) == name)
    assert np.mean(right) >= COLOUR_SHARE


def test_an_edit_stays_in_its_region(pipe: Pipeline, cases: QualityCases) -> None:
    labels = cases.labels[[e.name for e in demo.examples()].index("short")]
    edited = longer_hair(labels)
    assert (edited != labels).sum() > 200
    pair = [np.asarray(pipe(m, cases.prompts[-1], STEPS, generator=torch.Generator().manual_seed(2)).images[0])
            for m in (labels, edited)]  # fmt: skip
    changed = grow(labels != edited, 3)
    assert psnr_outside(pair[0], pair[1], changed) > psnr_outside(pair[0], pair[1], ~changed) + 3


@pytest.mark.parametrize("scalar_gate", [False, True])
def test_the_training_forward_is_the_runtimes(scalar_gate: bool, pipe: Pipeline) -> None:
    model = FaceMogle(scalar_gate=scalar_gate)
    load_parts(model, read_weights("demo"))
    g = torch.Generator().manual_seed(0)
    masks, x = torch.randn(2, 20, 64, 64, generator=g), torch.randn(2, 64, 64, generator=g)
    sequence, pooled = torch.randn(2, 48, 128, generator=g), torch.randn(2, 128, generator=g)
    schedule = make_schedule(pipe.bundle.config.scheduler, 3, 64)
    conditions = Conditions.from_mask_latents(
        masks, prompt_embeds=sequence, pooled_prompt_embeds=pooled, guidance_scale=3.5, grid=(8, 8)
    )
    engine = TorchEngine(pipe.bundle, torch.device("cpu"), torch.float32, ModelConfig(weight_is_scale=scalar_gate))
    engine.prepare(conditions, schedule)
    rope = model.rope(48, (8, 8))
    for k in range(3):
        expected = engine.step(x, k)
        sigma = schedule.sigmas[k].expand(2)
        assert_close(model(x, sigma, masks, sequence, pooled, rope), expected, rms=1e-5)
        half = model(x, torch.stack([sigma[0], sigma[0] / 2]), masks, sequence, pooled, rope)
        assert_close(half[:1], expected[:1], rms=1e-5)  # each image has its own noise level
        assert (half[1] - expected[1]).abs().max() > 1e-3


def test_gradients_reach_every_weight() -> None:
    with torch.enable_grad():
        model = FaceMogle()
        for p in model.parameters():
            p.data.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        x, masks = torch.randn(1, 16, 64), torch.randn(1, 20, 16, 64)
        out = model(x, torch.tensor([0.5]), masks, torch.randn(1, 4, 128), torch.randn(1, 128), model.rope(4, (4, 4)))
        out.square().mean().backward()
        # The last block computes only the image's rows to the end, so the LoRA of its q, MLP and output is unused.
        last = f"single_blocks.{CONFIG.num_single_layers - 1}"
        unused = {
            f"{last}.qkv_mlp.lora_up.0",
            f"{last}.qkv_mlp.lora_up.3",
            f"{last}.out.lora_up.0",
            f"{last}.out.lora_down",
        }
        for name, p in model.named_parameters():
            moved = p.grad is not None and bool(p.grad.abs().max() > 0)
            assert moved != (name in unused), name


def test_a_bundle_goes_apart_and_together_again(tmp_path: Path) -> None:
    """An interrupted training can go on from a bundle alone, which gives the weights, the VAE and the text encoders."""
    model = FaceMogle()
    load_parts(model, read_weights("demo"))
    unpack("demo", tmp_path)
    again = export(model, tmp_path / "vae", tmp_path / "text", tmp_path / "again.safetensors")
    one, two = Bundle("demo"), Bundle(again)
    assert one.config.to_dict() == two.config.to_dict()
    assert set(one.tensors) == set(two.tensors)
    for name in one.tensors:
        assert torch.equal(one.tensor(name), two.tensor(name)), name


def test_a_grown_model_draws_the_same() -> None:
    parts = read_weights("demo")
    small, large = FaceMogle(), FaceMogle(dataclasses.replace(CONFIG, num_single_layers=CONFIG.num_single_layers + 2))
    load_parts(small, parts)
    load_parts(large, parts, grow=True)
    g = torch.Generator().manual_seed(0)
    x, masks, sequence, pooled = (
        torch.randn(2, *shape, generator=g) for shape in ((16, 64), (20, 16, 64), (4, 128), (128,))
    )
    inputs = (x, torch.tensor([0.9, 0.3]), masks, sequence, pooled, small.rope(4, (4, 4)))
    assert_close(large(*inputs), small(*inputs), rms=1e-6)


def test_embedded_guidance_is_the_runtimes(tmp_path: Path) -> None:
    """A model that embeds guidance begins as its teacher, whatever the guidance, and computes what the runtime computes."""
    parts = read_weights("demo")
    teacher, model = FaceMogle(), FaceMogle(dataclasses.replace(CONFIG, guidance_embeds=True))
    load_parts(teacher, parts)
    load_parts(model, parts, grow=True)
    g = torch.Generator().manual_seed(0)
    shapes = ((16, 64), (20, 16, 64), (48, 128), (128,))
    x, masks, sequence, pooled = (torch.randn(2, *shape, generator=g) for shape in shapes)
    sigma, rope = torch.tensor([0.9, 0.9]), model.rope(48, (4, 4))
    inputs = (x, sigma, masks, sequence, pooled, rope)
    assert_close(model(*inputs, torch.tensor([1.0, 7.0])), teacher(*inputs), rms=1e-6)
    with pytest.raises(ValueError, match="embeds guidance"):
        model(*inputs)
    assert model.guidance_embedder is not None
    model.guidance_embedder.linear_2.weight.normal_(0, 0.1, generator=g)
    for p in model.parameters():
        p.copy_(p.half())  # a bundle's precision
    unpack("demo", tmp_path)
    bundle = Bundle(export(model, tmp_path / "vae", tmp_path / "text", tmp_path / "guided.safetensors"))
    schedule = make_schedule(bundle.config.scheduler, 2, 16)
    engine = TorchEngine(bundle, torch.device("cpu"), torch.float32, ModelConfig())
    drawn = []
    for scale in (1.0, 6.0):
        engine.prepare(
            Conditions.from_mask_latents(
                masks, prompt_embeds=sequence, pooled_prompt_embeds=pooled, guidance_scale=scale, grid=(4, 4)
            ),
            schedule,
        )
        inputs = (x, schedule.sigmas[1].expand(2), masks, sequence, pooled, rope)
        drawn.append(engine.step(x, 1))
        assert_close(model(*inputs, torch.full((2,), scale)), drawn[-1], rms=1e-5)
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2


def test_guidance_is_distilled_from_velocities_with_and_without_prompt() -> None:
    parts, g = read_weights("demo"), torch.Generator().manual_seed(0)
    teacher, student = FaceMogle(), FaceMogle(dataclasses.replace(CONFIG, guidance_embeds=True))
    load_parts(teacher, parts)
    load_parts(student, parts, grow=True)
    nothing = [torch.randn(4, 128, generator=g), torch.randn(128, generator=g)]
    blank = torch.randn(20, 16, 64, generator=g)
    faces, masks = torch.randn(1, 16, 64, generator=g), torch.randn(1, 20, 16, 64, generator=g)
    batch = Batch(faces, masks, torch.zeros(1, 19, 64), [], (4, 4), blank)
    rope = teacher.rope(4, (4, 4))
    silent = (nothing[0][None], nothing[1][None])
    told = (torch.randn(1, 4, 128, generator=g), torch.randn(1, 128, generator=g))
    loss_of = GuidedLoss(teacher, nothing)

    def loss(batch: Batch, text: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float(loss_of(student, batch, text, rope, torch.Generator().manual_seed(1))[0])

    # The student is the teacher yet, so its error is (w - 1) (v - v0): none where nothing is left to drop.
    assert loss(dataclasses.replace(batch, masks=blank[None]), silent) < 1e-4
    assert loss(batch, silent) > 1e-3
    assert loss(batch, told) > 1e-3


def test_parts_are_views() -> None:
    model = FaceMogle()
    for part in to_parts(model).values():
        for view in part.values():
            view.fill_(0.5)
    assert all(bool((p == 0.5).all()) for p in model.parameters())


def test_examples_from_the_command_line(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["examples"])
    assert listed.exit_code == 0
    assert all(e.name in listed.stdout for e in demo.examples())
    assert CliRunner().invoke(app, ["examples", "-o", str(tmp_path / "masks")]).exit_code == 0
    assert len(list((tmp_path / "masks").glob("*.png"))) == len(demo.examples()) == 8
    for e in demo.examples():
        assert np.array_equal(to_labels(tmp_path / "masks" / f"{e.name}.png"), to_labels(e.mask))
        assert (tmp_path / "masks" / f"{e.name}.txt").read_text().strip() == e.prompt
    with pytest.raises(InputError, match="is there already"):
        demo.write_examples(tmp_path / "masks")


def test_the_name_demo_beside_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert Bundle("demo").path == demo.BUNDLE
    result = CliRunner().invoke(
        app, ["generate", "demo", "-p", "a man", "-o", "face.png", "--steps", "1", "--seed", "1"]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "face.png").exists()
    assert "no such file" in str(CliRunner().invoke(app, ["info", "demo2"]).exception)


def test_captions_name_what_they_say() -> None:
    rng = np.random.default_rng(0)
    a = Attributes(
        sex="woman",
        age="old",
        skin="dark",
        hair_style="long",
        hair="gray",
        fringe=True,
        eyes="blue",
        beard=None,
        lips="red",
        glasses="round glasses",
        hat="green",
        earrings=True,
        necklace=True,
        smile=True,
        mouth_open=True,
        clothes="yellow",
        background="purple",
        looks="left",
    )
    seen: set[str] = set()
    for _ in range(100):
        text, named = describe(a, rng, keep=0.5)
        seen |= set(named)
        for attribute, word in (("background", "purple"), ("clothes", "yellow"), ("hat", "green"), ("hair", "gray")):
            assert (word in text) == (attribute in named), (text, named)
        assert ("earrings" in text) == ("earrings" in named)
        assert not [c for c in COLOURS if c in text.split() and c not in named.values()]
    assert seen == {k for k, v in a.to_dict().items() if v}


def test_muon_makes_updates_orthogonal() -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((24, 60), (60, 24), (3, 16, 40)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape, generator=g)))
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.3
    with torch.enable_grad():
        weight = torch.nn.Parameter(torch.randn(16, 16, generator=g))
        bias = torch.nn.Parameter(torch.zeros(16))
        optimizer = Muon([weight, bias], lr=0.05)
        losses = []
        for _ in range(60):
            x = torch.randn(64, 16, generator=g)
            loss = (x @ weight + bias - x.roll(1, 1) - 2).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_a_stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.time", lambda: now[0])
    clock = Clock(100)
    now[0] += 10
    assert clock.tick() == pytest.approx(0.1)
    now[0] += 1000  # stopped
    assert clock.tick() == pytest.approx(0.3)
    until = Clock(5, until=now[0] + 30)
    now[0] += 10
    assert until.tick() == pytest.approx(1 / 3)
    now[0] += 30
    assert until.tick() == 1
    assert learning_rate(0.2, 1000, warm_up=10, constant=0.4) == 1
    assert learning_rate(1.0, 1000, warm_up=10, constant=0.4) == pytest.approx(0.01)


def test_average_and_state(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    average = Average(layer, 0.9)
    layer.weight.fill_(1.0)
    for _ in range(200):
        average.update(layer)
    assert torch.allclose(average.module.weight, layer.weight, atol=1e-4)
    save_state(tmp_path / "a" / "x.state0", {"step": 3})
    assert torch.load(tmp_path / "a" / "x.state0", weights_only=True) == {"step": 3}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.state0"]


def test_noise_and_dropping() -> None:
    g = torch.Generator().manual_seed(0)
    sigma = noise_levels(20_000, g)
    assert 0.25 < float((sigma > 0.8).float().mean()) < 0.25 + 0.75 * 0.3
    assert float(sigma.median()) > torch.sigmoid(torch.tensor(SHIFT))
    index = torch.arange(2, 22).expand(5000, -1)
    dropped = drop_masks(index, g)
    nothing = (dropped[:, 0] == BLACK) & (dropped[:, 1] == WHITE) & (dropped[:, 2:] == BLACK).all(1)
    some = ~nothing & (dropped[:, 1:] == BLACK).any(1)
    assert float(nothing.float().mean()) == pytest.approx(NO_MASK, abs=0.02)
    assert float(some.float().mean()) == pytest.approx(DROPPED * (1 - NO_MASK), abs=0.02)
    assert bool((dropped[some, 0] == 2).all())


def test_measures_tell_faults() -> None:
    labels = np.zeros((1, 32, 32), np.uint8)
    labels[:, 4:28, 6:26] = 1
    labels[:, 10:12, 10:14], labels[:, 10:12, 18:22] = 4, 5
    labels[:, 14:18, 14:18], labels[:, 22:24, 12:20] = 2, 11
    assert face_like(labels[0])
    assert not face_like(labels[0, ::-1])
    assert not face_like(np.where(labels[0] == 2, 1, labels[0]))
    assert set(iou(labels, labels).values()) == {1.0}
    assert iou(np.roll(labels, 4, 2), labels)[2] == 0
    image = np.zeros((32, 32, 3), np.uint8)
    other = image.copy()
    other[:4] = 255
    region = np.zeros((32, 32), bool)
    region[:4] = True
    assert psnr_outside(image, other, region) > 100
    assert psnr_outside(image, other, ~region) < 1
    judge = ColourJudge()
    assert {judge.name(np.array(c, float), "background") for c in COLOURS.values()} == set(COLOURS)


def test_prompts_fit_the_tokenizer() -> None:
    prompts = json.loads((demo.EXAMPLES / "prompts.json").read_text())
    tokenizer = load_tokenizer("tokenizer_2", Bundle("demo").files("tokenizer_2"))
    assert max(len(ids) for ids in tokenizer(list(prompts.values())).input_ids) <= 48
