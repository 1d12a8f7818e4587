"""The page in a browser: painting, drawing, undoing, files and errors. `make page-test` installs Playwright and Chromium."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mogle_rt import Pipeline
from mogle_rt.edits.regions import changed_region, pixel_weights
from mogle_rt.masks import CLASS_NAMES, PALETTE, to_labels
from tests.server.live import MASKS, Live, live, pixels

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright, which `make page-test` installs")
expect = sync_api.expect

CHROMIUM = shutil.which("chromium")
HAIR = CLASS_NAMES.index("hair")
SLOW = 60_000  # milliseconds; only a page that hangs takes so long


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    with live([pipe]) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium starts here, which `make page-test` installs: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, served: Live) -> Iterator[Any]:
    """The page when it is ready. Its script has no error until then, and none until the test ends."""
    context = browser.new_context(viewport={"width": 1300, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: wrong.append(request.url) if not is_own(request.url, served.url) else None)
    opened.goto(served.url)
    expect(opened.locator("html[data-ready=true]")).to_be_attached(timeout=SLOW)
    yield opened
    context.close()
    assert wrong == []


def is_own(url: str, server: str) -> bool:
    """Whether an address is on this server, or holds its data itself."""
    return url.startswith((server + "/", "blob:", "data:"))


def canvas(page: Any) -> NDArray[np.uint8]:
    """The class numbers that the canvas shows. It fails if a colour is not that of a class."""
    url = page.locator("#mask").evaluate("c => c.toDataURL()")
    colours = pixels(url.partition(",")[2])
    same = (colours[:, :, None] == PALETTE).all(-1)
    assert same.any(-1).all()
    return same.argmax(-1).astype(np.uint8)


def example(page: Any, name: str) -> NDArray[np.uint8]:
    page.locator(".start", has_text=re.compile(f"^{name}$")).click()
    expect(page.locator("#prompt")).to_have_value(re.compile("."), timeout=SLOW)
    return canvas(page)


def drag(page: Any, *points: tuple[float, float]) -> None:
    """Paint a stroke through points of the mask, which are given as fractions of its width and height."""
    box = page.locator("#mask").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def draw(page: Any, steps: int) -> None:
    page.fill("#steps", str(steps))
    page.click("#draw")
    expect(page.locator("#status")).to_contain_text("drawn in", timeout=SLOW)


def test_paint_draw_undo(page: Any, served: Live) -> None:
    """Hair is painted onto an example with hard edges, then undone and done again. The image is drawn, with progress."""
    before = example(page, "short")
    assert np.array_equal(before, to_labels(MASKS["short"]))
    page.click(".class >> text=hair")
    drag(page, (0.2, 0.3), (0.2, 0.7))
    painted = canvas(page)
    changed = painted != before
    assert changed.sum() > 100
    assert (painted[changed] == HAIR).all()
    page.keyboard.press("Control+z")
    assert np.array_equal(canvas(page), before)
    page.keyboard.press("Control+Shift+z")
    assert np.array_equal(canvas(page), painted)

    page.fill("#seed", "7")
    page.select_option("#seed-mode", "fixed")
    page.fill("#steps", "12")
    said: list[str] = []
    page.expose_function("noted", lambda line: said.append(line))
    page.locator("#status").evaluate(
        "e => new MutationObserver(() => noted(e.textContent)).observe(e, {childList: true})"
    )
    page.locator("#tag").evaluate("e => new MutationObserver(() => noted(e.textContent)).observe(e, {childList: true})")
    page.click("#draw")
    expect(page.locator("#status")).to_contain_text("drawn in", timeout=SLOW)
    assert any(re.fullmatch(r"step \d+ of 12", line) for line in said)
    assert "preview" in said
    expect(page.locator("#result-note")).to_contain_text("seed 7, 12 steps")
    with page.expect_download() as download:
        page.click("#download")
    picture = Image.open(Path(download.value.path()))
    prompt = page.locator("#prompt").input_value()
    assert picture.info["seed"] == "7"
    assert picture.info["prompt"] == prompt
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    own = pipe(painted, prompt, seed=7, num_inference_steps=12).images[0]
    assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(own))


def pixels_of(page: Any, number: int) -> NDArray[np.uint8]:
    """The pixels of an image of the session; 0 is the newest."""
    read = """async i => { await i.decode(); const c = document.createElement("canvas"); c.width = i.naturalWidth;
        c.height = i.naturalHeight; c.getContext("2d").drawImage(i, 0, 0); return c.toDataURL(); }"""
    return pixels(page.locator(".past img").nth(number).evaluate(read).partition(",")[2])


def test_edit(page: Any, served: Live) -> None:
    """Hair is painted onto the image's mask: it is drawn there, and every pixel farther away than the margin stays."""
    before = example(page, "short")
    page.fill("#seed", "7")
    page.select_option("#seed-mode", "fixed")
    draw(page, 4)
    page.click("#edit")
    expect(page.locator("#edit-note")).to_contain_text("Paint on the mask")
    page.click("#draw")
    expect(page.locator("#draw-error")).to_contain_text("Nothing would change")
    page.click(".class >> text=hair")
    drag(page, (0.15, 0.25), (0.15, 0.6))
    after = canvas(page)
    expect(page.locator("#edit-note")).to_contain_text(f"{(after != before).sum():,} painted pixels")
    page.click("#edit-more summary")
    page.fill("#margin", "9")
    page.click("#kept >> text=nose")
    prompt = page.locator("#prompt").input_value()
    draw(page, 4)
    old, new = pixels_of(page, 1), pixels_of(page, 0)
    region = changed_region(before, after, [])
    outside = pixel_weights(region, 9, 4)[0].numpy() == 0
    assert outside.mean() > 0.5
    assert np.array_equal(old[outside], new[outside])
    assert (old != new).any(-1)[region].mean() > 0.5
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    own = pipe.edit(old, before, after, prompt, keep="nose", margin=9, seed=7, num_inference_steps=4).images[0]
    assert np.array_equal(new, np.asarray(own))

    expect(page.locator("#divider")).to_be_visible()
    assert page.locator("#before").get_attribute("src") == page.locator(".past img").nth(1).get_attribute("src")
    expect(page.locator(".past").nth(0)).to_contain_text("edit")
    page.click("#edit-stop")
    page.click(".start >> text=blank")
    page.click("#restore")
    expect(page.locator("#edit-panel")).to_be_visible()
    assert page.locator("#margin").input_value() == "9"
    assert np.array_equal(canvas(page), after)


def test_an_image_is_opened_and_edited(page: Any, tmp_path: Path) -> None:
    """An image from this page brings its mask and settings. One from elsewhere asks for its mask first."""
    mask = example(page, "bun")
    page.fill("#seed", "3")
    page.select_option("#seed-mode", "fixed")
    draw(page, 3)
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "face.png")
    page.reload()
    expect(page.locator("html[data-ready=true]")).to_be_attached(timeout=SLOW)
    page.set_input_files("#image-file", tmp_path / "face.png")
    expect(page.locator("#edit-panel")).to_be_visible(timeout=SLOW)
    assert np.array_equal(canvas(page), mask)
    assert [page.locator(f"#{name}").input_value() for name in ("seed", "steps")] == ["3", "3"]
    page.click("#anew >> text=hair")
    page.fill("#prompt", "a woman with red hair")
    draw(page, 3)
    old, hair = pixels_of(page, 1), pixels_of(page, 0)
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    options: dict[str, Any] = {"seed": 3, "num_inference_steps": 3}
    own = pipe.inpaint(tmp_path / "face.png", mask, "a woman with red hair", ["hair"], **options).images[0]
    assert np.array_equal(hair, np.asarray(own))

    Image.fromarray(old).save(tmp_path / "plain.png")
    page.set_input_files("#image-file", tmp_path / "plain.png")
    expect(page.locator("#edit-note")).to_contain_text("It holds no mask", timeout=SLOW)
    page.click("#draw")
    expect(page.locator("#draw-error")).to_contain_text("holds no mask")
    page.click("#edit-own")
    expect(page.locator("#edit-note")).to_contain_text("Paint on the mask")
    page.click("#anew >> text=everything")
    assert page.locator("#strength").input_value() == "0.6"
    draw(page, 3)
    prompt = page.locator("#prompt").input_value()
    own = pipe.image_to_image(old, mask, prompt, **options).images[0]
    assert np.array_equal(pixels_of(page, 0), np.asarray(own))

    page.set_input_files("#image-file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.locator("#image-error")).to_contain_text("can't be read as an image", timeout=SLOW)


def test_history_and_settings(page: Any) -> None:
    first = example(page, "hat")
    page.select_option("#seed-mode", "next")
    page.fill("#seed", "3")
    draw(page, 1)
    assert page.locator("#seed").input_value() == "4"
    page.click(".start >> text=blank")
    page.fill("#prompt", "an old man")
    draw(page, 2)
    expect(page.locator(".past")).to_have_count(2)
    page.click("#compare")
    expect(page.locator("#divider")).to_be_visible()
    page.locator("#slider").fill("20")
    page.locator(".past").nth(1).click()
    expect(page.locator("#divider")).to_be_hidden()
    page.click("#restore")
    assert np.array_equal(canvas(page), first)
    assert page.locator("#seed").input_value() == "3"
    assert "yellow hat" in page.locator("#prompt").input_value()


@pytest.mark.parametrize("form", ["palette", "colour", "grey", "npy"])
def test_a_saved_mask_is_read_back(page: Any, form: str, tmp_path: Path) -> None:
    """The saved file can be read by `masks`, and by the page itself."""
    example(page, "bun")
    drag(page, (0.1, 0.1), (0.9, 0.2))
    painted = canvas(page)
    with page.expect_download() as download:
        page.select_option("#save", form)
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    assert np.array_equal(to_labels(saved), painted)
    page.click(".start >> text=blank")
    assert not canvas(page).any()
    page.set_input_files("#file", saved)
    expect(page.locator("#mask-note")).not_to_contain_text("reading", timeout=SLOW)
    assert np.array_equal(canvas(page), painted)


def test_part_files_are_one_mask(page: Any, tmp_path: Path) -> None:
    labels = to_labels(MASKS["bun"])
    for number in (1, HAIR):
        plane = Image.fromarray((labels == number).astype(np.uint8) * 255)
        plane.save(tmp_path / f"00000_{CLASS_NAMES[number]}.png")
    page.set_input_files("#file", sorted(tmp_path.iterdir()))
    expect(page.locator("#mask-note")).not_to_contain_text("reading", timeout=SLOW)
    assert np.array_equal(canvas(page), np.where(np.isin(labels, (1, HAIR)), labels, 0))


def test_errors_are_shown_where_one_looks(page: Any) -> None:
    before = canvas(page)
    page.set_input_files("#file", {"name": "mask.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.locator("#mask-error")).to_contain_text("not a mask that can be read", timeout=SLOW)
    assert np.array_equal(canvas(page), before)
    photograph = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(photograph, "PNG")
    page.set_input_files("#file", {"name": "p.png", "mimeType": "image/png", "buffer": photograph.getvalue()})
    expect(page.locator("#mask-error")).to_contain_text("class colour", timeout=SLOW)
    page.fill("#steps", "1000")
    page.click("#draw")
    expect(page.locator("#draw-error")).to_contain_text("Steps")


def test_tools(page: Any) -> None:
    """Mirrored painting swaps left and right; and filling, erasing, picking a class, and painting with the keyboard work."""
    page.click(".start >> text=blank")
    page.click("#mirror")
    page.click(".class >> text=left eye")
    drag(page, (0.7, 0.4), (0.8, 0.4))
    mask = canvas(page)
    left, right = (np.argwhere(mask == CLASS_NAMES.index(name)) for name in ("l_eye", "r_eye"))
    assert len(left) == len(right) > 20
    assert sorted(map(tuple, left)) == sorted((y, mask.shape[1] - 1 - x) for y, x in right)
    page.click("#mirror")
    page.locator("#stage").focus()
    page.keyboard.press("f")
    page.click(".class >> text=skin")
    box = page.locator("#mask").bounding_box()
    page.mouse.click(box["x"] + 20, box["y"] + 20)
    filled = canvas(page)
    assert (filled[mask == 0] == 1).all()
    assert (filled[mask != 0] == mask[mask != 0]).all()
    page.keyboard.press("e")
    drag(page, (0.5, 0.8), (0.6, 0.8))
    erased = canvas(page)
    assert (erased[filled != erased] == 0).all()
    assert (filled != erased).any()
    page.keyboard.press("i")
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.4)
    expect(page.locator('.class[aria-checked="true"]')).to_have_text("left eye")
    page.locator("#stage").focus()
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Space")
    assert (canvas(page) != erased).any()


def test_stopping(page: Any, served: Live) -> None:
    """Stopping an image frees its place, and the page can draw again."""
    page.fill("#prompt", "x")
    page.fill("#steps", "100")
    page.select_option("#size", index=page.locator("#size option").count() - 1)
    page.click("#draw")
    expect(page.locator("#status")).to_contain_text("step", timeout=SLOW)
    page.click("#cancel")
    expect(page.locator("#status")).to_have_text("stopped")
    page.select_option("#size", "auto")
    draw(page, 1)


def test_a_phone(browser: Any, served: Live) -> None:
    """Nothing is wider than the screen, and a finger can paint."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, color_scheme="dark")
    page = context.new_page()
    page.goto(served.url)
    expect(page.locator("html[data-ready=true]")).to_be_attached(timeout=SLOW)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    before = canvas(page)
    box = page.locator("#mask").bounding_box()
    page.touchscreen.tap(box["x"] + 12, box["y"] + 12)
    changed = canvas(page) != before
    assert changed.any()
    assert changed[:20, :20].sum() == changed.sum()
    context.close()


def test_a_key_is_asked_for(browser: Any, served: Live) -> None:
    pipe = served.studio.pipe
    with live([pipe], keys=[b"a-key-of-the-test"]) as running:
        context = browser.new_context()
        page = context.new_page()
        page.goto(running.url)
        page.fill("#key", "another")
        page.click("#key-form button")
        expect(page.locator("#key-error")).to_contain_text("doesn't know", timeout=SLOW)
        page.fill("#key", "a-key-of-the-test")
        page.click("#key-form button")
        expect(page.locator("html[data-ready=true]")).to_be_attached(timeout=SLOW)
        expect(page.locator("#key-form")).to_be_hidden()
        context.close()
