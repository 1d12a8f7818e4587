"""Edits by the server's protocol: answers equal the pipeline's own edits, everything else is refused in one sentence."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mogle_rt import Pipeline
from mogle_rt.jobs.settings_read import read_settings
from mogle_rt.masks import Labels, to_image, to_labels
from tests.server.live import EDITS, MASKS, Live, encoded, error_of, events, live, pixels

HAIR, SIDE, STEPS = 13, 64, 2
BEFORE = to_labels(MASKS["short"], height=SIDE, width=SIDE)
AFTER = BEFORE.copy()
AFTER[8:32, 8:16] = np.where(BEFORE[8:32, 8:16] == 0, HAIR, BEFORE[8:32, 8:16])


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """The pipeline that answers are compared with; the server has another."""
    pipeline = Pipeline("demo", device="cpu", dtype="fp32")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    pipeline = Pipeline("demo", device="cpu", dtype="fp32")
    pipeline.set_progress_bar_config(disable=True)
    with live([pipeline], places=16) as running:
        yield running


@pytest.fixture(scope="module")
def face(served: Live) -> bytes:
    """An image that the server drew from the mask ``BEFORE``, as its client holds it."""
    body = {"prompt": "a man", "semantic_mask": encoded(png(BEFORE)), "seed": 5, "size": "64x64"}
    answer = served.draw(**body, guidance_scale=3.0, condition_scale=0.9)
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def png(labels: Labels) -> bytes:
    buffer = io.BytesIO()
    to_image(labels).save(buffer, "PNG")
    return buffer.getvalue()


def saved(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def plain(image: bytes) -> bytes:
    """The image without what is written inside it."""
    return saved(Image.fromarray(np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))))


def post(served: Live, files: dict[str, bytes], **fields: Any) -> httpx.Response:
    return served.client.post(EDITS, data=fields, files={name: ("../f", data) for name, data in files.items()})


def images_of(answer: httpx.Response) -> list[NDArray[np.uint8]]:
    assert answer.status_code == 200, answer.text
    return [pixels(one["b64_json"]) for one in answer.json()["data"]]


def own(image: Any) -> NDArray[np.uint8]:
    return np.asarray(image.images[0])


# As the image says:
OF_FACE: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "condition_scale": 0.9}


def test_the_image_says_all_that_is_not_asked_for(served: Live, pipe: Pipeline, face: bytes) -> None:
    """Old mask, prompt, seed, steps and scales come from the image. Image i has the seed plus i, as the pipeline has it."""
    answers = images_of(post(served, {"image": face, "semantic_mask": png(AFTER)}, n=2))
    for i, image in enumerate(answers):
        assert np.array_equal(image, own(pipe.edit(face, BEFORE, AFTER, "a man", seed=5 + i, **OF_FACE)))
    old = np.asarray(Image.open(io.BytesIO(face)))
    assert (answers[0] != old).any(-1)[8:32, 8:16].mean() > 0.5
    assert np.array_equal(answers[0][:, 40:], old[:, 40:])
    assert not np.array_equal(answers[0], answers[1])


@pytest.mark.parametrize("as_json", [True, False])
def test_what_is_asked_for_goes_before(served: Live, pipe: Pipeline, face: bytes, as_json: bool) -> None:
    fields = {
        "prompt": "a woman",
        "seed": 7,
        "num_inference_steps": 4,
        "strength": 0.5,
        "margin": 4,
        "keep": "nose, skin",
    }
    files = {"image": face, "semantic_mask": png(AFTER), "semantic_mask_before": png(np.zeros_like(BEFORE))}
    if as_json:
        answer = served.client.post(EDITS, json=fields | {name: encoded(data) for name, data in files.items()})
    else:
        answer = post(served, files, **fields)
    expected = own(
        pipe.edit(
            face, np.zeros_like(BEFORE), AFTER, "a woman", 0.5, ["nose", "skin"], margin=4, seed=7,
            **OF_FACE | {"num_inference_steps": 4},
        )
    )  # fmt: skip
    assert np.array_equal(images_of(answer)[0], expected)


def test_inpainting_image_to_image_and_areas(served: Live, pipe: Pipeline, face: bytes) -> None:
    """The other ways to say what is drawn anew: classes, everything, and OpenAI's transparent mask."""
    (hair,) = images_of(post(served, {"image": face}, regions="hair", prompt="red hair"))
    assert np.array_equal(hair, own(pipe.inpaint(face, BEFORE, "red hair", ["hair"], seed=5, **OF_FACE)))

    (everything,) = images_of(post(served, {"image[]": face}, prompt="a boy"))
    assert np.array_equal(everything, own(pipe.image_to_image(face, BEFORE, "a boy", seed=5, **OF_FACE)))

    area = np.zeros((SIDE, SIDE), bool)
    area[:16, :16] = True
    alpha = Image.fromarray(np.where(area, 0, 255).astype(np.uint8))
    see_through = Image.new("RGBA", (SIDE, SIDE))
    see_through.putalpha(alpha)
    files = {"image": face, "mask": saved(see_through)}
    (corner,) = images_of(post(served, files, prompt="blue", size="64x64"))
    assert np.array_equal(corner, own(pipe.edit(face, BEFORE, BEFORE, "blue", area=area, seed=5, **OF_FACE)))

    files = {"image": plain(face), "mask": saved(see_through), "semantic_mask": png(AFTER)}
    (other,) = images_of(post(served, files, seed=1, num_inference_steps=2))
    assert np.array_equal(other, own(pipe.edit(face, AFTER, AFTER, "", area=area, seed=1, num_inference_steps=2)))


def test_the_image_comes_back_where_nothing_changes(served: Live, face: bytes) -> None:
    answer = post(served, {"image": face, "semantic_mask": png(BEFORE)})
    assert np.array_equal(images_of(answer)[0], np.asarray(Image.open(io.BytesIO(face))))
    assert "nothing is drawn anew" in answer.json()["warnings"][0]
    answer = post(served, {"image": plain(face)}, prompt="x", num_inference_steps=2)
    assert "background alone" in answer.json()["warnings"][0]


def test_an_edited_image_can_be_edited(served: Live, face: bytes, tmp_path: Path) -> None:
    """Images hold their masks: those that are drawn, and edits of them; a JPEG too."""
    (tmp_path / "face.png").write_bytes(face)
    labels = read_settings(tmp_path / "face.png").labels
    assert labels is not None
    assert np.array_equal(labels, BEFORE)
    answer = post(served, {"image": face, "semantic_mask": png(AFTER)}, output_format="jpeg", strength=0.6)
    (tmp_path / "edited.jpg").write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    settings = read_settings(tmp_path / "edited.jpg")
    assert settings.labels is not None
    assert np.array_equal(settings.labels, AFTER)
    assert (settings.prompt, settings.seed, settings.steps) == ("a man", 5, STEPS)

    told = served.client.post("/v1/images/settings", files={"image": ("x", face)}).json()
    assert {name: told[name] for name in OF_FACE} == OF_FACE
    assert (told["prompt"], told["seed"], told["own_model"]) == ("a man", 5, True)
    read = np.frombuffer(base64.b64decode(told["mask"]["labels"]), np.uint8).reshape(SIDE, SIDE)
    assert np.array_equal(read, BEFORE)
    told = served.client.post("/v1/images/settings", files={"image": ("x", plain(face))}).json()
    assert (told["mask"], told["prompt"]) == (None, None)


def test_an_edit_can_be_watched_and_cancelled(served: Live, pipe: Pipeline, face: bytes) -> None:
    """Steps are counted as they are run. Previews keep what the edit keeps."""
    body = {"image": encoded(face), "semantic_mask": encoded(png(AFTER)), "num_inference_steps": 10, "strength": 0.6}
    with served.client.stream("POST", EDITS, json=body | {"stream": True, "partial_images": 2}) as answer:
        told = list(events(answer))
    kinds = [event["type"] for event in told]
    assert kinds[0] == "image_edit.queued"
    assert kinds[-1] == "image_edit.completed"
    assert [(e["step"], e["steps"]) for e in told if e["type"] == "image_edit.progress"] == [
        (i, 6) for i in range(1, 7)
    ]
    edited = own(pipe.edit(face, BEFORE, AFTER, "a man", 0.6, seed=5, **OF_FACE | {"num_inference_steps": 10}))
    assert np.array_equal(pixels(told[-1]["b64_json"]), edited)
    previews = [pixels(e["b64_json"]).astype(int) for e in told if e["type"] == "image_edit.partial_image"]
    assert previews
    assert np.abs(previews[0][:, 40:] - edited[:, 40:]).mean() < 4  # a JPEG of the same pixels

    body |= {"num_inference_steps": 100, "strength": 1, "n": 3}
    with served.client.stream("POST", EDITS, json=body | {"stream": True}) as answer:
        watched = events(answer)
        job = next(watched)["job"]
        assert httpx.delete(f"{served.url}/v1/jobs/{job}", trust_env=False).json()["cancelled"]
        assert list(watched)[-1]["error"]["code"] == "cancelled"


def test_edits_of_one_shape_are_drawn_together(pipe: Pipeline, face: bytes) -> None:
    """Also beside one that changes nothing, which comes back exactly. In a batch an edit is its own, up to rounding."""
    pipeline = Pipeline("demo", device="cpu", dtype="fp32")
    pipeline.set_progress_bar_config(disable=True)
    asked = [(png(AFTER), "a man"), (png(BEFORE), "a boy"), (png(np.roll(AFTER, 2, 1)), "a girl")]
    with live([pipeline], max_batch=4) as running, ThreadPoolExecutor(4) as threads:
        first = threads.submit(running.draw, prompt="x", num_inference_steps=30)
        while not running.studio.metrics.drawing._value.get():
            pass
        waiting = [threads.submit(post, running, {"image": face, "semantic_mask": m}, prompt=p) for m, p in asked]
        first.result()
        images = [images_of(one.result())[0] for one in waiting]
        assert running.studio.metrics.batches._sum.get() / 2 == 2  # one alone, and three together
    assert np.array_equal(images[1], np.asarray(Image.open(io.BytesIO(face))))
    for (mask, prompt), image in zip(asked, images, strict=True):
        alone = own(pipe.edit(face, BEFORE, to_labels(mask), prompt, seed=5, **OF_FACE))
        assert np.abs(image.astype(int) - alone).max() <= 1


SQUARE = saved(Image.new("RGB", (64, 64), "grey"))
REFUSED: list[tuple[int, dict[str, bytes], dict[str, Any], str]] = [
    (422, {}, {"prompt": "x"}, "give the image to edit"),
    (422, {"image": b"no picture"}, {}, "the image: can't be read as an image"),
    (422, {"image": SQUARE[:-40]}, {"prompt": "x"}, "can't be read"),
    (422, {"image": SQUARE, "semantic_mask": png(AFTER)}, {}, "give the mask that belongs to the image"),
    (422, {"image": SQUARE}, {"regions": "hair"}, "give the mask that belongs to the image"),
    (422, {"image": SQUARE, "mask": SQUARE}, {}, "transparent where the image is to be drawn anew"),
    (422, {"image": SQUARE, "mask": saved(Image.new("RGBA", (32, 64)))}, {}, "64 x 64 pixels, got 32 x 64"),
    (422, {"image": SQUARE, "mask": b"no picture"}, {}, "mask: not a mask that can be read"),
    (422, {"image": saved(Image.new("RGB", (60, 64)))}, {}, "multiples of 16"),
    (422, {"image": saved(Image.new("RGBA", (64, 64)))}, {}, "has transparent pixels"),
    (422, {"image": saved(Image.new("I;16", (64, 64)))}, {}, "8 bits a channel"),
    (422, {"image": saved(Image.new("1", (4096, 4096)))}, {}, "an image can have at most 1,048,576 pixels"),
    (422, {"image": SQUARE, "mask": saved(Image.new("LA", (4096, 2048)))}, {}, "a mask can have at most 4,194,304"),
    (422, {"image": SQUARE, "semantic_mask": b"no picture", "semantic_mask_before": png(BEFORE)}, {}, "not a mask that can"),
    (422, {"image": SQUARE, "hat": SQUARE}, {}, "unknown file 'hat'"),
    (422, {"image": SQUARE}, {"colour": "red"}, "unknown field 'colour'"),
    (422, {"image": SQUARE}, {"size": "96x64"}, "size must be the image's, 64x64"),
    (422, {"image": SQUARE}, {"strength": "0"}, "strength"),
    (422, {"image": SQUARE}, {"strength": "1.1"}, "strength"),
    (422, {"image": SQUARE}, {"strength": "1e-30", "num_inference_steps": "2"}, "leaves none to run"),
    (422, {"image": SQUARE}, {"margin": "10000"}, "margin"),
    (422, {"image": SQUARE}, {"num_inference_steps": "101"}, "at most 100"),
    (422, {"image": SQUARE}, {"image": "AAAA"}, "give image once"),
    (422, {"image": SQUARE, "semantic_mask_before": png(BEFORE)}, {"regions": "hiar"}, "did you mean 'hair'?"),
    (422, {"image": SQUARE, "semantic_mask_before": png(BEFORE)}, {"regions": "hair", "keep": "x"}, "no class 'x'"),
    (400, {}, {"image": "/etc/passwd"}, "image must be a file's contents in base64"),
    (400, {"image": SQUARE}, {"mask": "http://x/y.png"}, "mask must be a file's contents in base64"),
    (404, {"image": SQUARE}, {"model": "gpt-image-1"}, "this server has 'demo'"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "files", "fields", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_wrong_edits_are_refused(
    served: Live, status: int, files: dict[str, bytes], fields: dict[str, Any], words: str
) -> None:
    answer = post(served, files, **fields) if files else served.client.post(EDITS, json=fields)
    assert answer.status_code == status, answer.text
    assert words in error_of(answer)["message"]


def test_two_images_are_refused(served: Live) -> None:
    answer = served.client.post(
        EDITS, data={"prompt": "x"}, files=[("image[]", ("a", SQUARE)), ("image[]", ("b", SQUARE))]
    )
    assert answer.status_code == 422
    assert "give one image, got 2" in error_of(answer)["message"]


def test_spoiled_settings_are_refused_or_left_out(served: Live, face: bytes) -> None:
    """Whatever stands in an image's settings, the answer is an image or one sentence; and no error of the server."""
    chance = random.Random(0)
    text = Image.open(io.BytesIO(face)).info["XML:com.adobe.xmp"].encode()
    start = face.index(text[200:260]) - 200
    for i in range(40):
        spoiled = bytearray(face)
        for _ in range(chance.randrange(1, 6)):
            spoiled[start + chance.randrange(len(text))] = chance.randrange(32, 127)
        kept = bytes(spoiled)
        repaired = kept if i % 2 else with_right_sums(kept)
        answer = post(served, {"image": repaired, "semantic_mask": png(BEFORE)}, num_inference_steps=1)
        assert answer.status_code in (200, 422), answer.text
        if answer.status_code == 422:
            error_of(answer)
        told = served.client.post("/v1/images/settings", files={"image": ("x", repaired)})
        assert told.status_code in (200, 422), told.text


def with_right_sums(png_file: bytes) -> bytes:
    """The file with the checksum of each chunk made right again, so that what was spoiled is read."""
    import zlib

    made, at = bytearray(png_file[:8]), 8
    while at < len(png_file):
        size = int.from_bytes(png_file[at : at + 4], "big")
        body = png_file[at + 4 : at + 8 + size]
        made += png_file[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + size
    return bytes(made)


def test_a_damaged_mask_inside_the_image_is_refused(served: Live, face: bytes) -> None:
    info = Image.open(io.BytesIO(face)).info["XML:com.adobe.xmp"]
    known = json.loads(info.partition('default">')[2].partition("</rdf:li>")[0])
    from mogle_rt.jobs.image_files import encode_image

    picture = Image.open(io.BytesIO(face))
    for damaged, words in (("AAAA", "can't be read"), ("%%%", "can't be read"), (7, "mask_png")):
        image = encode_image(picture, "PNG", known | {"mask_png": damaged})
        answer = post(served, {"image": image}, regions="hair")
        assert answer.status_code == 422, answer.text
        assert words in error_of(answer)["message"]


def test_openai_s_client_edits(served: Live, pipe: Pipeline, face: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    monkeypatch.setenv("NO_PROXY", "*")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    answer = client.images.edit(
        image=("face.png", face),
        prompt="a man with a beard",
        n=2,
        extra_body={"semantic_mask": encoded(png(AFTER)), "seed": 3},
    )
    for i, one in enumerate(answer.data):
        expected = own(pipe.edit(face, BEFORE, AFTER, "a man with a beard", seed=3 + i, **OF_FACE))
        assert np.array_equal(pixels(one.b64_json), expected)
    told = client.images.edit(
        image=[("face.png", face)], prompt="x", stream=True, partial_images=1, extra_body={"regions": "hair"}
    )
    last = list(told)[-1]
    assert last.type == "image_edit.completed"
    assert np.array_equal(pixels(last.b64_json), own(pipe.inpaint(face, BEFORE, "x", ["hair"], seed=5, **OF_FACE)))
