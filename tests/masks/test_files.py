"""A file's mask is what a person sees in it. Hostile files end in an error of one line, soon and in little memory."""

from __future__ import annotations

import contextlib
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mogle_rt import masks
from mogle_rt.errors import MaskError
from mogle_rt.masks import borders
from tests.masks.test_masks import BLURS, COLOURS, draw_face, encoded, palette_image, random_labels, rgb

ORIENTATION = 0x0112


@pytest.mark.parametrize(("kind", "draw"), [("PNG", palette_image), ("PNG", rgb), ("TIFF", rgb), ("WEBP", rgb)])
@pytest.mark.parametrize(
    ("tag", "turn"), [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (2, np.fliplr)]
)
def test_exif_orientation(kind: str, draw, tag: int, turn) -> None:  # type: ignore[no-untyped-def]
    labels = random_labels(0)
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    image = encoded(draw(labels), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(masks.to_labels(image), turn(labels))


def test_alpha_0_is_background_whatever_lies_under_it() -> None:
    labels = random_labels(0)
    alpha = np.random.default_rng(1).integers(0, 3, labels.shape).astype(np.uint8)
    seen = np.where(alpha == 0, 0, labels)
    under = np.where(alpha[..., None] == 0, (255, 255, 255), COLOURS[labels]).astype(np.uint8)  # no class is white
    colours = np.dstack([under, alpha])
    np.testing.assert_array_equal(masks.to_labels(colours), seen)
    for order in ("celebamask", "farl"):
        np.testing.assert_array_equal(masks.to_labels(Image.fromarray(colours, mode="RGBA"), order=order), seen)
    numbers = np.where(alpha == 0, 200, labels).astype(np.uint8)
    np.testing.assert_array_equal(masks.to_labels(Image.fromarray(np.dstack([numbers, alpha]), mode="LA")), seen)


def test_transparency_of_a_palette() -> None:
    labels = random_labels(0)
    image = palette_image(labels)
    read = encoded(image, "PNG", transparency=1)
    np.testing.assert_array_equal(masks.to_labels(read), np.where(labels == 1, 0, labels))


def test_a_picture_of_which_nothing_is_seen() -> None:
    with pytest.warns(UserWarning, match="every pixel is transparent"):
        assert not masks.to_labels(np.dstack([COLOURS[random_labels(0)], np.zeros((24, 20), dtype=np.uint8)])).any()


def voc(number: int) -> tuple[int, int, int]:
    return tuple(sum((number >> (3 * i + c) & 1) << (7 - i) for i in range(8)) for c in range(3))  # type: ignore[return-value]


def test_voc_s_palette_renumbered() -> None:
    labels = draw_face(64)
    colours = np.array([voc(i) for i in range(19)], dtype=np.uint8)
    assert colours[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    order = np.random.default_rng(3).permutation(19)
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[labels], mode="P")
    image.putpalette(colours[order].flatten().tolist())
    np.testing.assert_array_equal(masks.to_labels(image), labels)
    np.testing.assert_array_equal(masks.to_labels(Image.fromarray(colours[labels])), labels)


def test_class_colours_and_blends_of_them_in_a_palette() -> None:
    """A picture was resized smoothly, and then an optimiser stored it with a palette of all its colours."""
    smooth = rgb(draw_face(256)).resize((200, 200), Image.Resampling.BILINEAR)
    few = smooth.quantize(200, dither=Image.Dither.NONE)
    np.testing.assert_array_equal(masks.to_labels(few), masks.to_labels(few.convert("RGB")))


@pytest.mark.parametrize("method", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("size", [200, 300, 512])
def test_smoothed_numbers_are_refused(size: int, method: Image.Resampling) -> None:
    labels = draw_face(256)
    smooth = np.minimum(np.asarray(Image.fromarray(labels).resize((size, size), method)), 18)
    with pytest.raises(MaskError, match="class numbers were smoothed"):
        masks.to_labels(smooth)
    masks.to_labels(np.asarray(Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST)))


@pytest.mark.parametrize("turned", [False, True], ids=["down", "across"])
def test_numbers_smoothed_in_one_direction_are_refused(turned: bool) -> None:
    """The picture has bands of classes, and only the borders between them are smoothed."""
    bands = np.repeat(np.array([0, 13, 1, 17, 4, 18], dtype=np.uint8), 40)[:, None].repeat(64, axis=1)
    smooth = np.asarray(Image.fromarray(bands).resize((64, 400), Image.Resampling.BILINEAR))
    for mask, smoothed in ((bands, False), (smooth, True)):
        with pytest.raises(MaskError, match="numbers were smoothed") if smoothed else contextlib.nullcontext():
            masks.to_labels(mask.T if turned else mask)


def test_numbers_in_a_jpeg_are_refused() -> None:
    with pytest.raises(MaskError, match="JPEG changes class numbers"):
        masks.to_labels(encoded(Image.fromarray(np.minimum(draw_face(64), 4)), "JPEG", quality=100))


def test_the_order_of_opencv_is_recognised() -> None:
    with pytest.raises(MaskError, match=r"OpenCV's order \(blue, green, red\); give picture\[\.\.\., ::-1\]"):
        masks.to_labels(COLOURS[draw_face(128)][..., ::-1])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_single_plane_is_recognised(channels: int) -> None:
    plane = (draw_face(64) == 1).astype(np.uint8) * np.uint8(255)
    with pytest.raises(MaskError, match="black-and-white plane of one class"):
        masks.to_labels(plane if channels == 1 else np.dstack([plane] * 3))


# Paths


@pytest.mark.parametrize(
    "name", ["https://example.org/mask.png", "s3://a/b.png", "file:///a.png", "data:image/png;base64,x"]
)
def test_addresses_are_not_fetched(name: str) -> None:
    for path in (name, Path(name)):
        with pytest.raises(MaskError, match="masks are not fetched from addresses; save the file and give its path"):
            masks.to_labels(path)


def test_home_folder_and_npy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    labels = random_labels(0)
    np.save(tmp_path / "mask.npy", labels.astype(np.int64))
    np.testing.assert_array_equal(masks.to_labels("~/mask.npy"), labels)
    np.save(tmp_path / "objects.npy", np.array([[None]]), allow_pickle=True)
    with pytest.raises(MaskError, match=r"objects\.npy: can't be read"):
        masks.to_labels(tmp_path / "objects.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "mask.npy").read_bytes()[:300])
    with pytest.raises(MaskError, match=r"cut\.npy: can't be read"):
        masks.to_labels(tmp_path / "cut.npy")


# Hostile files


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [4097, 30_000, 2**31 - 1])
def test_too_many_pixels_are_refused_by_the_header(side: int, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(MaskError, match=r"mask\.png: .*16,777,216 pixels"):
        masks.to_labels(path)


@pytest.mark.parametrize("kind", ["eps", "ppm", "avif", "ico"])
def test_other_formats_are_not_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.png"
    if kind == "eps":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
        monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was started"))
    elif kind == "avif":
        path.write_bytes(b"\x00\x00\x00\x20ftypavif\x00\x00\x00\x00avifmif1miaf" + bytes(100))
    else:
        Image.new("L", (16, 16)).save(path, kind)
    with pytest.raises(MaskError, match=r"mask\.png: not a mask that can be read"):
        masks.to_labels(path)


def test_a_photograph_is_refused_by_a_sample() -> None:
    small = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    photograph = np.asarray(Image.fromarray(small).resize((4000, 3000), Image.Resampling.BICUBIC))
    start = time.process_time()
    with pytest.raises(MaskError, match=r"which is not a class colour; .* is it a photograph\?"):
        masks.to_labels(photograph)
    assert time.process_time() - start < 1


def test_a_picture_of_nothing_but_borders_is_refused_after_some_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its colours is compared with the mixtures of 171 pairs of classes, which would take 20 s for 4096²."""
    cells = np.random.default_rng(0).integers(0, 19, (16, 16)).astype(np.uint8)
    small = rgb(np.kron(cells, np.ones((16, 16), dtype=np.uint8))).resize((128, 128), Image.Resampling.BILINEAR)
    picture = np.asarray(small.resize((256, 256), Image.Resampling.BILINEAR))
    masks.to_labels(picture)
    monkeypatch.setattr(borders, "MOST_COMPARED", 10_000)
    with pytest.raises(MaskError, match="too many of its colours lie between those of two classes"):
        masks.to_labels(picture)


def test_settling_takes_little_memory() -> None:
    """A blurred picture of 2048² takes less than 75 bytes a pixel, since it is settled tile by tile."""
    picture = np.asarray(rgb(draw_face(256)).resize((2048, 2048), Image.Resampling.BILINEAR))
    tracemalloc.start()
    masks.to_labels(picture)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20


@pytest.mark.parametrize("blur", ["jpeg_50", "lanczos_larger"])
def test_tiles_make_no_difference(blur: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.asarray(BLURS[blur](rgb(draw_face(512))))
    whole = masks.to_labels(picture)
    monkeypatch.setattr(borders, "TILE", 150)
    np.testing.assert_array_equal(masks.to_labels(picture), whole)
    strange = picture.copy()
    strange[140:160, 290:310] = (140, 70, 200)
    with pytest.raises(MaskError, match=r"pixel \(x=290, y=140\)"):
        masks.to_labels(strange)


def test_masks_do_without_scipy() -> None:
    for path in Path(masks.__file__).parent.glob("*.py"):
        assert "scipy" not in path.read_text(), path.name
