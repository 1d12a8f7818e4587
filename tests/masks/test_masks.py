"""Every kind of mask that people have gives the same labels, and what is no mask is refused with a clear reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from mogle_rt import masks
from mogle_rt.errors import MaskError
from mogle_rt.masks import PALETTE, TOLERANCE, Labels, MaskLike
from tests.conftest import examples

# Written out here again, so that a change of the module's table is noticed.
REFERENCE_PALETTE = {
    "background": (0, 0, 0),
    "skin": (204, 0, 0),
    "nose": (76, 153, 0),
    "eye_glasses": (204, 204, 0),
    "l_eye": (51, 51, 255),
    "r_eye": (204, 0, 204),
    "l_brow": (0, 255, 255),
    "r_brow": (255, 204, 204),
    "l_ear": (102, 51, 0),
    "r_ear": (255, 0, 0),
    "mouth": (102, 204, 0),
    "u_lip": (255, 255, 0),
    "l_lip": (0, 0, 153),
    "hair": (0, 0, 204),
    "hat": (255, 51, 153),
    "ear_ring": (0, 204, 204),
    "necklace": (0, 51, 0),
    "neck": (255, 153, 51),
    "cloth": (0, 204, 0),
}
COLOURS = np.array(list(REFERENCE_PALETTE.values()), dtype=np.uint8)

# (class, centre y, centre x, radius y, radius x) in parts of the picture's size, painted in this order.
FACE = (
    *((18, 1.05, 0.5, 0.3, 0.5), (17, 0.8, 0.5, 0.2, 0.14), (16, 0.9, 0.5, 0.03, 0.15), (13, 0.42, 0.5, 0.4, 0.33)),
    *(
        (8, 0.5, 0.24, 0.07, 0.03),
        (9, 0.5, 0.76, 0.07, 0.03),
        (15, 0.58, 0.24, 0.02, 0.015),
        (1, 0.48, 0.5, 0.33, 0.24),
    ),
    *((14, 0.1, 0.5, 0.1, 0.25), (6, 0.38, 0.39, 0.015, 0.06), (7, 0.38, 0.61, 0.015, 0.06)),
    *(
        (3, 0.45, 0.39, 0.05, 0.08),
        (4, 0.45, 0.39, 0.02, 0.04),
        (5, 0.45, 0.61, 0.02, 0.04),
        (2, 0.55, 0.5, 0.07, 0.04),
    ),
    *((10, 0.68, 0.5, 0.03, 0.07), (11, 0.66, 0.5, 0.012, 0.08), (12, 0.7, 0.5, 0.012, 0.08)),
)


def draw_face(size: int, *, without: tuple[int, ...] = ()) -> Labels:
    """A face of ellipses, with all 19 classes except those in `without`."""
    labels = np.zeros((size, size), dtype=np.uint8)
    y, x = np.mgrid[:size, :size] / size
    for c, cy, cx, ry, rx in FACE:
        if c not in without:
            labels[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1] = c
    return labels


def random_labels(seed: int, height: int = 24, width: int = 20) -> Labels:
    """Blobs of all classes."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 19, (height, width)).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The image, after it was written as a file of this kind and read back."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


def palette_image(labels: Labels) -> Image.Image:
    image = Image.fromarray(labels, mode="P")
    image.putpalette(COLOURS.flatten().tolist())
    return image


def shuffled_palette(labels: Labels) -> Image.Image:
    """A picture whose palette has the class colours in another order, as some editors save it."""
    order = np.random.default_rng(7).permutation(19)
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[labels], mode="P")
    image.putpalette(COLOURS[order].flatten().tolist())
    return image


def other_palette(labels: Labels) -> Image.Image:
    """A palette picture of class numbers, shown in other colours than the classes' own."""
    image = Image.fromarray(labels, mode="P")
    image.putpalette([(37 * i + 11) % 256 for i in range(3 * 256)])
    return image


def grey_palette(labels: Labels) -> Image.Image:
    return Image.fromarray(labels, mode="L").convert("P")


def palette_of_the_greys_used(labels: Labels) -> Image.Image:
    """A grey picture of class numbers as GIF or an optimiser stores it: the palette has only the greys in use."""
    greys, indices = np.unique(labels, return_inverse=True)
    image = Image.fromarray(indices.reshape(labels.shape).astype(np.uint8), mode="P")
    image.putpalette(np.repeat(greys, 3).tolist())
    return image


def rgb(labels: Labels) -> Image.Image:
    return Image.fromarray(COLOURS[labels], mode="RGB")


def rgba(labels: Labels) -> Image.Image:
    alpha = np.random.default_rng(0).integers(1, 256, labels.shape).astype(np.uint8)  # alpha 0 would be background
    return Image.fromarray(np.dstack([COLOURS[labels], alpha]), mode="RGBA")


def grey16(labels: Labels) -> Image.Image:
    return Image.fromarray(labels.astype(np.uint16))


PICTURES: dict[str, Callable[[Labels], Image.Image]] = {
    "palette": palette_image,
    "palette_in_another_order": shuffled_palette,
    "palette_of_other_colours": other_palette,
    "palette_of_greys": grey_palette,
    "palette_of_the_greys_used": palette_of_the_greys_used,
    "no_palette": lambda labels: Image.fromarray(labels, mode="P"),
    "grey": lambda labels: Image.fromarray(labels, mode="L"),
    "grey_alpha": lambda labels: Image.fromarray(labels, mode="L").convert("LA"),
    "grey_16_bit": grey16,
    "grey_32_bit": lambda labels: Image.fromarray(labels.astype(np.int32), mode="I"),
    "grey_float": lambda labels: Image.fromarray(labels.astype(np.float32), mode="F"),
    "three_equal_channels": lambda labels: Image.fromarray(labels, mode="L").convert("RGB"),
    "rgb": rgb,
    "rgba": rgba,
}
FILES: dict[str, tuple[Callable[[Labels], Image.Image], str]] = {
    "palette.png": (palette_image, "PNG"),
    "palette_in_another_order.png": (shuffled_palette, "PNG"),
    "palette.gif": (palette_image, "GIF"),
    "palette.bmp": (palette_image, "BMP"),
    "palette.tif": (palette_image, "TIFF"),
    "palette_of_the_greys_used.png": (palette_of_the_greys_used, "PNG"),
    "grey.gif": (lambda labels: Image.fromarray(labels, mode="L"), "GIF"),
    "grey.png": (lambda labels: Image.fromarray(labels, mode="L"), "PNG"),
    "grey_16_bit.png": (grey16, "PNG"),
    "grey_16_bit.tif": (grey16, "TIFF"),
    "rgb.png": (rgb, "PNG"),
    "rgb.bmp": (rgb, "BMP"),
    "rgba.png": (rgba, "PNG"),
}
NUMPY_DTYPES = ("u1", "i1", "u2", "i2", "<i4", ">i4", "u4", "i8", "u8", "f2", "f4", "f8")
TORCH_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
# One array [1, H, 3] or [1, H, 4] would be a picture in colours, so these masks are at least 5 wide.
WIDE = hnp.arrays(np.uint8, st.tuples(st.integers(1, 24), st.integers(5, 24)), elements=st.integers(0, 18))
LABELS = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24), elements=st.integers(0, 18)
)
quick = examples(20)


@pytest.mark.quick
def test_palette_and_names_are_the_reference_s() -> None:
    assert dict(zip(masks.CLASS_NAMES, map(tuple, PALETTE.tolist()), strict=True)) == REFERENCE_PALETTE


@pytest.mark.quick
@pytest.mark.parametrize("kind", PICTURES)
@quick
@given(labels=LABELS)
def test_every_kind_of_picture_gives_the_labels(kind: str, labels: Labels) -> None:
    np.testing.assert_array_equal(masks.to_labels(PICTURES[kind](labels)), labels)


@pytest.mark.parametrize("name", FILES)
@quick
@given(labels=LABELS)
def test_every_kind_of_file_gives_the_labels(name: str, labels: Labels, tmp_path: Path) -> None:
    draw, kind = FILES[name]
    path = tmp_path / name
    draw(labels).save(path, kind)
    np.testing.assert_array_equal(masks.to_labels(path), labels)
    np.testing.assert_array_equal(masks.to_labels(str(path)), labels)
    with Image.open(path) as image:  # Pillow has opened the file, but not read the pixels yet
        np.testing.assert_array_equal(masks.to_labels(image), labels)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@quick
@given(labels=WIDE)
def test_arrays_of_every_dtype_give_the_labels(dtype: str, labels: Labels) -> None:
    array = labels.astype(dtype)
    for mask in (array, np.asfortranarray(array), array[None]):
        result = masks.to_labels(mask)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, labels)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
@quick
@given(labels=WIDE)
def test_tensors_of_every_dtype_give_the_labels(dtype: torch.dtype, labels: Labels) -> None:
    tensor = torch.from_numpy(labels.astype(np.int64)).to(dtype)
    for mask in (tensor, tensor[None], tensor.t().contiguous().t()):
        np.testing.assert_array_equal(masks.to_labels(mask), labels)


def test_tensor_that_requires_grad() -> None:
    labels = random_labels(0)
    tensor = torch.from_numpy(labels.astype(np.float32)).requires_grad_()
    np.testing.assert_array_equal(masks.to_labels(tensor), labels)


@pytest.mark.parametrize("channels", [3, 4])
@quick
@given(labels=LABELS)
def test_arrays_of_colours_give_the_labels(channels: int, labels: Labels) -> None:
    colours = np.asarray(rgb(labels) if channels == 3 else rgba(labels))
    np.testing.assert_array_equal(masks.to_labels(colours), labels)
    np.testing.assert_array_equal(masks.to_labels(torch.from_numpy(colours.copy())), labels)


def test_a_list_of_all_kinds_at_once(tmp_path: Path) -> None:
    labels = random_labels(1)
    palette_image(labels).save(tmp_path / "mask.png")
    kinds: list[MaskLike] = [
        tmp_path / "mask.png",
        str(tmp_path / "mask.png"),
        labels,
        labels.astype(np.int64),
        torch.from_numpy(labels),
        np.asarray(rgb(labels)),
        *(draw(labels) for draw in PICTURES.values()),
    ]
    for several in (kinds, tuple(kinds)):
        batch = masks.to_label_batch(several, height=24, width=20)
        assert len(batch) == len(kinds)
        for one in batch:
            np.testing.assert_array_equal(one, labels)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["u1", "i8", "f4"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_arrays_of_several_masks(count: int, dtype: str) -> None:
    stack = np.stack([random_labels(i, 10, 12) for i in range(count)]).astype(dtype)
    colours = COLOURS[stack.astype(np.uint8)]
    for several in (stack, stack[:, None], colours, list(stack)):
        for mask in (several, several if isinstance(several, list) else torch.from_numpy(several)):
            batch = masks.to_label_batch(mask, height=10, width=12)
            np.testing.assert_array_equal(np.stack(batch), stack)


def test_one_mask_is_a_batch_of_one() -> None:
    labels = random_labels(2, 10, 12)
    for mask in (labels, rgb(labels), np.asarray(rgb(labels)), torch.from_numpy(labels)):
        (one,) = masks.to_label_batch(mask, height=10, width=12)
        np.testing.assert_array_equal(one, labels)


def test_a_palette_in_another_order_holds_for_background_alone() -> None:
    labels = np.zeros((4, 4), dtype=np.uint8)
    image = shuffled_palette(labels)
    assert np.asarray(image).min() > 0  # this palette's first colour isn't black
    np.testing.assert_array_equal(masks.to_labels(image), labels)


# Colour noise


def test_tolerance_is_less_than_half_of_the_least_distance_of_two_classes() -> None:
    distances = np.linalg.norm(COLOURS[:, None].astype(float) - COLOURS, axis=-1)
    assert distances[~np.eye(19, dtype=bool)].min() > 2 * TOLERANCE


@quick
@given(labels=LABELS, seed=st.integers(0, 2**32 - 1))
def test_colour_noise_within_the_tolerance_changes_nothing(labels: Labels, seed: int) -> None:
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(*labels.shape, 3))
    length = rng.uniform(0, TOLERANCE - 1, (*labels.shape, 1))  # 1 less, since rounding also moves a colour
    noisy = COLOURS[labels] + direction / np.linalg.norm(direction, axis=-1, keepdims=True) * length
    picture = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    if (picture == picture[..., :1]).all() and 0 < picture.max() < 19:
        return  # all pixels are dark greys, so this is a picture of class numbers
    np.testing.assert_array_equal(masks.to_labels(picture), labels)


def invented(got: Labels, truth: Labels, distance: int = 16) -> Counter[str]:
    """How many pixels of each class lie farther than ``distance`` rows or columns from all true pixels of the class."""
    far: Counter[str] = Counter()
    for y, x in np.argwhere(got != truth):
        around = truth[max(0, y - distance) : y + distance + 1, max(0, x - distance) : x + distance + 1]
        if not (around == got[y, x]).any():
            far[masks.CLASS_NAMES[got[y, x]]] += 1
    return far


BLURS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg_75": lambda picture: encoded(picture, "JPEG", quality=75),
    "jpeg_95": lambda picture: encoded(picture, "JPEG", quality=95),
    "jpeg_50": lambda picture: encoded(picture, "JPEG", quality=50),
    "webp_80": lambda picture: encoded(picture, "WEBP", quality=80),
    "bilinear_smaller": lambda picture: picture.resize((256, 256), Image.Resampling.BILINEAR),
    "bicubic_smaller": lambda picture: picture.resize((333, 333), Image.Resampling.BICUBIC),
    "lanczos_smaller": lambda picture: picture.resize((384, 384), Image.Resampling.LANCZOS),
    "bilinear_larger": lambda picture: picture.resize((768, 768), Image.Resampling.BILINEAR),
    "lanczos_larger": lambda picture: picture.resize((1024, 1024), Image.Resampling.LANCZOS),
    "smaller_then_jpeg": lambda picture: encoded(
        picture.resize((384, 384), Image.Resampling.BICUBIC), "JPEG", quality=75
    ),
}


@pytest.mark.parametrize("absent", [(), (8, 9, 12, 15, 16)], ids=["all_classes", "some_absent"])
@pytest.mark.parametrize("blur", BLURS)
def test_jpeg_and_smooth_resizing(blur: str, absent: tuple[int, ...]) -> None:
    """At borders, mixtures of two classes pass through other classes' colours, as from hair to background through the
    lower lip's. No such class may appear there."""
    truth = draw_face(512, without=absent)
    picture = BLURS[blur](rgb(truth))
    got = masks.to_labels(picture)
    truth = np.asarray(Image.fromarray(truth).resize(picture.size, Image.Resampling.NEAREST))
    assert (got == truth).mean() > 0.985
    assert not invented(got, truth)
    for c in set(range(19)) - set(absent):
        recall = ((got == c) & (truth == c)).sum() / (truth == c).sum()
        assert recall > 0.6, masks.CLASS_NAMES[c]


def test_jpeg_of_a_thin_region_keeps_it() -> None:
    truth = np.full((128, 128), 1, dtype=np.uint8)
    truth[40:44, 20:100] = 6
    got = masks.to_labels(encoded(rgb(truth), "JPEG", quality=95, subsampling=0))
    assert ((got == 6) & (truth == 6)).sum() > 0.8 * (truth == 6).sum()
    assert set(np.unique(got)) == {1, 6}


@quick
@given(
    seed=st.integers(0, 1000),
    x=st.integers(0, 39),
    y=st.integers(0, 39),
    colour=st.sampled_from([(128, 128, 128), (255, 255, 255), (150, 100, 200), (20, 60, 120), (255, 128, 255)]),
)
def test_a_colour_of_no_class_is_named(seed: int, x: int, y: int, colour: tuple[int, int, int]) -> None:
    picture = np.tile(COLOURS[seed % 19], (40, 40, 1))
    picture[y, x] = colour
    with pytest.raises(MaskError) as caught:
        masks.to_labels(picture)
    distances = np.linalg.norm(COLOURS.astype(float) - colour, axis=-1)
    nearest = list(REFERENCE_PALETTE)[int(distances.argmin())]
    message = str(caught.value)
    assert f"(x={x}, y={y})" in message
    assert str(colour) in message
    assert f"nearest is {nearest} {REFERENCE_PALETTE[nearest]}, {distances.min():.0f} away" in message


def test_a_foreign_region_is_named_although_it_touches_others() -> None:
    picture = COLOURS[draw_face(256)]
    picture[100:160, 100:160] = (140, 70, 200)
    with pytest.raises(MaskError, match=r"\(140, 70, 200\), which is not a class colour"):
        masks.to_labels(picture)


@pytest.mark.parametrize(("side", "patch"), [(128, 9), (128, 30), (512, 5), (512, 30)])
@pytest.mark.parametrize("colour", [(200, 30, 90), (10, 200, 120), (140, 70, 200)])
def test_a_small_foreign_patch_is_named(colour: tuple[int, int, int], patch: int, side: int) -> None:
    """The patch may lie near to borders, but it has one colour, which is no mixture of those around it."""
    picture = COLOURS[draw_face(side)]
    middle = side // 2
    picture[middle : middle + patch, middle : middle + patch] = colour
    with pytest.raises(MaskError, match="which is not a class colour"):
        masks.to_labels(picture)


def test_a_photograph_is_no_mask() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    with pytest.raises(MaskError, match="not a class colour"):
        masks.to_labels(noise)


# Resizing


@pytest.mark.quick
@quick
@given(labels=LABELS, height=st.integers(1, 50), width=st.integers(1, 50))
def test_resizing_is_nearest_neighbour(labels: Labels, height: int, width: int) -> None:
    got = masks.to_labels(labels, height=height, width=width)
    rows = [min(int((i + 0.5) * labels.shape[0] / height), labels.shape[0] - 1) for i in range(height)]
    columns = [min(int((j + 0.5) * labels.shape[1] / width), labels.shape[1] - 1) for j in range(width)]
    np.testing.assert_array_equal(got, np.array([[labels[r, c] for c in columns] for r in rows]))
    assert set(np.unique(got)) <= set(np.unique(labels))


@pytest.mark.parametrize("size", [(256, 256), (64, 1024), (16, 128)])
def test_resizing_equals_pillow_s_nearest(size: tuple[int, int]) -> None:
    labels = draw_face(512)
    height, width = size
    expected = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(masks.to_labels(labels, height=height, width=width), expected)


def test_one_size_alone_keeps_the_other() -> None:
    labels = random_labels(3, 10, 12)
    assert masks.to_labels(labels, height=20).shape == (20, 12)
    assert masks.to_labels(labels, width=6).shape == (10, 6)


# Renderings


@quick
@given(labels=LABELS)
def test_renderings_read_back_as_the_labels(labels: Labels) -> None:
    colours = masks.colorize(labels)
    np.testing.assert_array_equal(colours, COLOURS[labels])
    np.testing.assert_array_equal(masks.to_labels(colours), labels)
    image = encoded(masks.to_image(labels), "PNG")
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), labels)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), COLOURS[labels])


@pytest.mark.quick
@quick
@given(labels=LABELS)
def test_condition_pictures(labels: Labels) -> None:
    palette, *planes = (masks.condition_picture(labels, i) for i in range(20))
    np.testing.assert_array_equal(palette, COLOURS[labels])
    for c, plane in enumerate(planes):
        assert plane.dtype == np.uint8
        np.testing.assert_array_equal(plane, np.where(labels == c, 255, 0)[..., None].repeat(3, axis=-1))


# What is no mask


def numbers(value: float, dtype: str = "f8") -> NDArray[Any]:
    array = np.zeros((6, 7), dtype=dtype)
    array[2, 5] = value
    return array


NO_MASKS: dict[str, tuple[Callable[[], Any], str]] = {
    "class_19": (
        lambda: numbers(19, "u1"),
        r"pixel \(x=5, y=2\) holds 19.*classes are 0 \(background\) to 18 \(cloth\)",
    ),
    "class_255": (lambda: Image.fromarray(numbers(255, "u1"), mode="L"), r"\(x=5, y=2\) holds 255"),
    "class_300_in_16_bits": (lambda: Image.fromarray(numbers(300, "u2")), r"\(x=5, y=2\) holds 300"),
    "class_40_in_a_palette": (lambda: Image.fromarray(numbers(40, "u1"), mode="P"), r"\(x=5, y=2\) holds 40"),
    "class_19_in_a_tensor": (lambda: torch.from_numpy(numbers(19, "i8")), r"\(x=5, y=2\) holds 19"),
    "negative": (lambda: numbers(-1, "i4"), r"\(x=5, y=2\) holds -1"),
    "fraction": (lambda: numbers(1.5), r"\(x=5, y=2\) holds 1.5"),
    "nan": (lambda: numbers(np.nan), r"\(x=5, y=2\) holds nan"),
    "infinity": (lambda: numbers(np.inf), r"\(x=5, y=2\) holds inf"),
    "black_and_white": (lambda: Image.fromarray(numbers(255, "u1")).convert("1"), r"\(x=5, y=2\) holds 255"),
    "booleans": (lambda: np.zeros((4, 4), dtype=bool), "got values of type bool"),
    "boolean_tensor": (lambda: torch.zeros(4, 4, dtype=torch.bool), "got values of type bool"),
    "float8": (lambda: torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "got values of type torch.float8_e4m3fn"),
    "complex": (lambda: np.zeros((4, 4), dtype=complex), "got values of type complex128"),
    "texts": (lambda: np.full((4, 4), "skin"), "got values of type <U4"),
    "objects": (lambda: np.full((4, 4), None), "got values of type object"),
    "colours_as_floats": (lambda: np.zeros((4, 4, 3), dtype=np.float32), r"must be uint8 \(0…255\), got float32"),
    "one_dimension": (lambda: np.zeros(16, dtype=np.uint8), r"got shape \[16\]"),
    "no_dimension": (lambda: torch.tensor(3), r"got shape \[\]"),
    "two_channels": (lambda: np.zeros((4, 4, 2), dtype=np.uint8), r"got shape \[4, 4, 2\]"),
    "four_dimensions": (lambda: np.zeros((2, 4, 4, 3), dtype=np.uint8), r"got shape \[2, 4, 4, 3\]"),
    "no_rows": (lambda: np.zeros((0, 5), dtype=np.uint8), r"got shape \[0, 5\]"),
    "no_pixels": (lambda: Image.new("L", (0, 5)), "a picture of 0 x 5 pixels holds no mask"),
    "sparse": (lambda: torch.zeros(4, 4).to_sparse(), "got a sparse one"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(4, 4)], layout=torch.jagged), "got a nested one"),
    "meta": (lambda: torch.zeros(4, 4, device="meta"), "got a meta one"),
    "number": (lambda: 3, "got int"),
    "nothing": (lambda: None, "got NoneType"),
    "nested_list": (lambda: [[0, 1], [2, 3]], "got list"),
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", NO_MASKS)
def test_what_is_no_mask(kind: str) -> None:
    make, message = NO_MASKS[kind]
    with pytest.raises(MaskError, match=message) as caught:
        masks.to_labels(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("several", [[], (), np.zeros((0, 8, 8), dtype=np.uint8), torch.zeros(0, 1, 8, 8)], ids=type)
def test_no_masks_at_all(several: Any) -> None:
    with pytest.raises(MaskError, match="the list of masks is empty"):
        masks.to_label_batch(several, height=8, width=8)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_one_mask_as_planes_is_no_batch(kind: Callable[[NDArray[Any]], Any]) -> None:
    """One-hot planes, with the classes first or last, and colours with the channels first are refused. But 19 masks of
    two classes are a batch."""
    labels = random_labels(0)
    hot = (labels[..., None] == np.arange(19)).astype(np.int64)
    for planes, dimension in ((hot, 2), (hot.transpose(2, 0, 1), 0)):
        with pytest.raises(
            MaskError, match=rf"is one-hot; give its class numbers: its argmax over dimension {dimension}"
        ):
            masks.to_label_batch(kind(planes), height=24, width=20)
    colours = COLOURS[labels].transpose(2, 0, 1)
    words = r"shape \[3, 24, 20\] is 3 masks, but not all .* class numbers .* colours must have shape \[H, W, 3 or 4\]"
    with pytest.raises(MaskError, match=words):
        masks.to_label_batch(kind(np.ascontiguousarray(colours)), height=24, width=20)
    assert len(masks.to_label_batch(kind((hot.transpose(2, 0, 1) + 1) % 2), height=24, width=20)) == 19
    assert len(masks.to_label_batch(kind(np.stack([labels] * 3)), height=24, width=20)) == 3


def test_the_bad_one_of_a_list_is_named(tmp_path: Path) -> None:
    good = np.zeros((4, 4), dtype=np.uint8)
    with pytest.raises(MaskError, match=r"^mask 2: pixel \(x=0, y=0\) holds 77"):
        masks.to_label_batch([good, good, good + 77], height=4, width=4)
    with pytest.raises(MaskError, match=r"mask 1: .*got list"):
        masks.to_label_batch([good, [[0]]], height=4, width=4)  # type: ignore[list-item]
    with pytest.raises(MaskError, match=r"absent\.png: no such file"):
        masks.to_label_batch([good, tmp_path / "absent.png"], height=4, width=4)


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    labels = draw_face(64)
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "truncated":
        palette_image(labels).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "damaged":
        rgb(labels).save(path)
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
        path.write_bytes(data)
    return path


BAD_FILES = {
    "absent": "no such file",
    "folder": "is a folder, not a mask",
    "empty": "not a mask that can be read",
    "text": "not a mask that can be read",
    "truncated": "can't be read",
    "damaged": "can't be read",
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(kind: str, tmp_path: Path) -> None:
    path = bad_file(kind, tmp_path)
    for mask in (path, str(path)):
        with pytest.raises(MaskError) as caught:
            masks.to_labels(mask)
        assert str(caught.value).startswith(f"{path}: {BAD_FILES[kind]}")


def test_a_picture_that_turns_out_truncated_when_it_is_read(tmp_path: Path) -> None:
    with Image.open(bad_file("truncated", tmp_path)) as image, pytest.raises(MaskError, match="can't be read"):
        masks.to_labels(image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
@examples(40)
@given(data=st.data())
def test_damaged_pictures_are_labels_or_an_error(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    """Whatever bytes a file holds, it gives labels from 0 to 18 or raises a MaskError."""
    buffer = BytesIO()
    (palette_image if kind in ("GIF", "BMP") else rgb)(draw_face(40)).save(buffer, kind)
    raw = bytearray(buffer.getvalue())
    for position in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=4)):
        raw[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "mask"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        labels = masks.to_labels(path)
    except MaskError as error:
        message = str(error)
    else:
        assert labels.max() <= 18
        return
    assert message.startswith(f"{path}: ")
