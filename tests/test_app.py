"""The page in a real browser: Chromium, clicks and strokes. `make test-app` installs what it needs."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import PIL.Image
import pytest
from mde_edit import MDEEditPipeline


pytestmark = pytest.mark.app
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
playwright = pytest.importorskip("playwright.sync_api")

from mde_edit.tools.app import COLORS, ROOT, SHOWN, drawing_size, explain, presets, serve  # noqa: E402
from mde_edit.tools.publish import files_of_space  # noqa: E402
from mde_edit.tools.studio import ATTRIBUTE, OBJECT, SETTING_NAMES, Studio  # noqa: E402


STEPS = 4  # of most edits here: what they look like is not what is tested
EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/edit.json"))
# WebGL on the CPU is wanted for the editors alone; the page around them is composed without it.
BROWSER = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
BROWSER += ["--disable-gpu-compositing"]
# What an editor draws is drawn on the CPU. Its shader chooses among all of the GPU's texture units; of a GPU with one,
# two editors cost 7.7 CPU seconds to open, not 13.3. `drawing` waits by the rest: an editor draws on a change alone.
CANVAS = """
window.drawn = {calls: 0, pictures: 0, last: 0};
for (const {prototype} of [WebGLRenderingContext, WebGL2RenderingContext]) {
    const {getParameter, drawElements, texImage2D} = prototype;
    prototype.getParameter = function (name) {
        return name === this.MAX_TEXTURE_IMAGE_UNITS ? 1 : getParameter.call(this, name);
    };
    prototype.drawElements = function (...told) {
        drawn.calls += 1;
        drawn.last = performance.now();
        return drawElements.apply(this, told);
    };
    prototype.texImage2D = function (...told) {
        drawn.pictures += told.at(-1) instanceof ImageBitmap;
        return texImage2D.apply(this, told);
    };
}
"""


def disk(image, points=None, box=None):
    """Stands for a segmenter: what lies around a click, or a box's own pixels."""
    y, x = np.mgrid[: image.height, : image.width]
    if box is not None:
        return (box[0] <= x) & (x < box[2]) & (box[1] <= y) & (y < box[3])
    return np.hypot(x - points[0][0], y - points[0][1]) < image.width / 8


@pytest.fixture(scope="module")
def studio():
    pipe = MDEEditPipeline.from_pretrained(ROOT / "emoji_ldm")
    pipe.set_progress_bar_config(disable=True)
    return Studio(pipe, str(ROOT / "emoji_ldm"), segmenter=disk)


@pytest.fixture(scope="module")
def address(studio):
    _, url, _ = serve(studio, prevent_thread_lock=True, quiet=True)
    yield url
    gradio.close_all(verbose=False)


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=BROWSER)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as somebody new, at a width in pixels; nobody may meet an error of the page's own.

    scale: of the screen's pixels to the page's; at a half of them an editor draws a quarter.
    """
    contexts, errors = [], []

    def visit(width: int = 1280, scale: float = 0.5):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, device_scale_factor=scale))
        contexts[-1].add_init_script(CANVAS)
        page = contexts[-1].new_page()
        page.set_default_timeout(90_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.add_style_tag(
            content="* {animation: none !important; transition: none !important}"
        )  # each frame is costly
        button(page, "Edit").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not errors


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


@contextmanager
def drawing(page, pictures: int = 0):
    """What is done inside makes the editors draw, of which `pictures` new ones; goes on when they rest."""
    page.evaluate("Object.assign(drawn, {calls: 0, pictures: 0})")
    yield
    page.wait_for_function(
        "pictures => drawn.calls && drawn.pictures >= pictures && performance.now() - drawn.last > 400",
        arg=pictures,
        polling=50,
    )


def take_example(page, number: int, editors: int) -> None:
    with drawing(page, pictures=2 * editors):  # each with what is painted on it
        page.locator("#examples button").nth(number).click()
        page.locator(f"#editor-{editors - 1} canvas").first.wait_for()


def paint(page, slot: int) -> None:
    """Strokes across the middle of an editor."""
    editor = page.locator(f"#editor-{slot}")
    editor.scroll_into_view_if_needed()
    editor.get_by_label("Brush").first.click()
    box = editor.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    with drawing(page):
        page.mouse.move(x - 60, y)
        page.mouse.down()
        for dx, dy in ((60, 20), (-60, 40), (60, 60)):
            page.mouse.move(x + dx, y + dy, steps=2)
        page.mouse.up()


def told(page, where: str, text: str) -> str:
    """The message at one of the page's steps, once `text` is in it."""
    place = page.locator(f"#{where}")
    place.get_by_text(text).wait_for()
    return place.inner_text()


def files(page, folder) -> dict:
    """What the page offers, downloaded: {name: path}."""
    found = {}
    for link in page.locator("#files a[download]").all():
        name = link.get_attribute("download")
        found[name] = folder / name
        found[name].write_bytes(page.request.get(link.get_attribute("href")).body())
    return found


def choose_fast(page, steps: int = STEPS) -> None:
    """The fastest preset, and still fewer steps."""
    page.get_by_role("radio", name="fast").click()
    page.get_by_role("button", name="Advanced").click()
    number = page.locator("#setting-steps input")
    playwright.expect(number).to_have_value(str(presets(embedded=True)["fast"]["steps"]), timeout=60_000)
    number.fill(str(steps))
    number.press("Tab")


def read(path, mode="RGB"):
    return np.asarray(PIL.Image.open(path).convert(mode))


def test_from_an_example_to_an_edit_by_paint_and_by_a_word(visit, tmp_path, monkeypatch):
    page = visit()
    take_example(page, 2, editors=2)
    choose_fast(page, steps=10)
    button(page, "Invert").click()
    assert "hardly to be told" in told(page, "source-status", "Inverted in")
    for slot in (0, 1):
        with drawing(page):
            page.locator(f"#slot-{slot}").get_by_role("button", name="Clear", exact=True).click()
    paint(page, 0)
    with drawing(page, pictures=1):
        page.locator("#slot-1").get_by_role("button", name="Find it").click()
        told(page, "source-status", "Already inverted")
    button(page, "Edit").click()
    told(page, "edit-status", "Edited in")
    found = files(page, tmp_path)
    assert {"edit.py", "edited.png", "inversion.safetensors", "picture.png", "run.json"} <= set(found)

    picture, edited = read(found["picture.png"]), read(found["edited.png"])
    dog, red = (read(found[f"{name}.png"], "L") > 127 for name in ("object_dog", "attribute_red"))
    assert 0.02 < dog.mean() < 0.3 and dog[: len(dog) // 4].sum() == 0  # the strokes, below the middle
    drawn = read(EXAMPLES[2] / "red.png", "L") > 127
    small = np.asarray(PIL.Image.fromarray(red).resize(drawn.shape[::-1], 0))
    assert (small & drawn).sum() / (small | drawn).sum() > 0.6  # what attention finds is where the hat is
    inside = np.asarray(PIL.Image.fromarray(dog | red).resize(picture.shape[1::-1], 0))
    difference = np.abs(picture.astype(float) - edited).mean(-1)
    assert difference[inside].mean() > 20 and difference[~inside].mean() < 8

    monkeypatch.chdir(tmp_path)
    found["edited.png"].rename("from_the_page.png")
    runpy.run_path("edit.py")  # the script that the page shows, on the files that it offers
    assert np.array_equal(read("edited.png"), read("from_the_page.png"))


def test_an_own_picture_and_what_can_be_wrong_with_it(visit, tmp_path):
    page = visit()
    button(page, "Edit").click()
    told(page, "edit-status", "There is no picture yet")
    button(page, "Invert").click()
    told(page, "source-status", "There is no picture yet")
    huge = tmp_path / "huge.jpg"
    PIL.Image.open(EXAMPLES[1] / "image.png").convert("RGB").resize((4000, 4000)).save(huge)
    page.locator("input[type=file]").first.set_input_files(huge)
    told(page, "source-status", "4000 × 4000 pixels, edited at 128 × 128.")
    assert not page.locator("#edit-status").inner_text()
    page.get_by_label("It shows").fill("a cat and a dog on grass")
    page.get_by_label("It should show").fill("a cat and a dog " * 30)
    page.get_by_label("It should show").press("Tab")
    told(page, "words-status", "shorten it")
    with drawing(page, pictures=1):
        page.get_by_label("It should show").fill("a tiger and a dog on grass")
        page.get_by_label("It should show").press("Tab")
        page.locator("#slot-0").get_by_text("tiger").first.wait_for()
    button(page, "Edit").click()
    told(page, "edit-status", "object_masks['tiger'] is empty")
    paint(page, 0)

    chips = page.get_by_label("New objects")
    chips.click()
    chips.fill("zebra")
    chips.press("Enter")
    chips.press("Tab")
    told(page, "words-status", "'zebra' is not in the prompt")
    page.locator(".token", has_text="zebra").locator(".token-remove").click()
    page.locator("#slot-1").wait_for(state="hidden")
    place = page.locator("#slot-0").get_by_label("Now it is")
    place.fill("horse")
    place.press("Enter")
    page.locator("#slot-0").get_by_role("button", name="Find it").click()
    told(page, "slot-status-0", "'horse' is not in the prompt")

    choose_fast(page)
    button(page, "Edit").click()  # and what was painted is still there
    told(page, "edit-status", "Edited in")
    mask = read(files(page, tmp_path)["object_tiger.png"], "L")
    assert 0.02 < (mask > 127).mean() < 0.3


def test_a_mask_from_a_file_and_from_a_click(visit, tmp_path):
    page = visit(scale=1)  # at which a mask comes back as it was
    take_example(page, 1, editors=2)
    upload = page.locator("#slot-0").get_by_test_id("Upload a mask-upload-button")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    upload.set_input_files(tmp_path / "broken.png")
    told(page, "slot-status-0", "cannot identify")
    with drawing(page, pictures=1):
        upload.set_input_files(EXAMPLES[1] / "tiger.png")
    shown = page.locator("#click-1 img").first
    shown.scroll_into_view_if_needed()
    box = shown.bounding_box()
    with drawing(page, pictures=1):
        shown.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    choose_fast(page)
    button(page, "Edit").click()
    told(page, "edit-status", "Edited in")
    found = files(page, tmp_path)
    dog, tiger = (read(found[f"object_{name}.png"], "L") > 127 for name in ("dog", "tiger"))
    size = drawing_size(PIL.Image.open(found["picture.png"]))
    expected = np.asarray(PIL.Image.open(EXAMPLES[1] / "tiger.png").convert("L").resize(size, 0)) > 127
    assert np.array_equal(dog, expected)
    y, x = np.nonzero(tiger)
    assert abs(x.mean() / size[0] - 0.5) < 0.02 and abs(y.mean() / size[1] - 0.5) < 0.02


@pytest.mark.slow
def test_two_at_once_get_their_own(visit, studio, tmp_path):
    pages, places = [visit(), visit()], (0, 3)
    for page, number in zip(pages, places):
        take_example(page, number, editors=2)
        choose_fast(page)
    for page in pages:
        button(page, "Edit").click()
    for page, number in zip(pages, places):
        told(page, "edit-status", "Edited in")
        folder = tmp_path / str(number)
        folder.mkdir()
        found = files(page, folder)
        picture = PIL.Image.open(found["picture.png"])
        assert np.array_equal(picture.convert("RGB"), PIL.Image.open(EXAMPLES[number] / "image.png").convert("RGB"))
        settings = json.loads(found["run.json"].read_text())["settings"]
        masks = {
            f"{role}_masks": {word: read(found[file], "L") > 127 for word, (file,) in (settings[role] or {}).items()}
            for role in (OBJECT, ATTRIBUTE)
        }
        again = studio.pipe(
            settings["prompt"],
            inversion=studio.pipe.load_inversion(found["inversion.safetensors"]),
            guidance_scale=settings["guidance_scale"],
            **masks,
            **{name: settings[name] for name in SETTING_NAMES},
        )
        assert np.array_equal(read(found["edited.png"]), again.images[0])


def test_every_setting_is_explained():
    texts = {name: explain(name) for name in SHOWN}
    assert all(len(text) > 10 for text in texts.values()), texts
    assert "lambda_2" in texts["ccl_weight"] and "DDIM" in texts["steps"]


def test_it_fits_a_phone(visit):
    page = visit(width=390)
    take_example(page, 3, editors=3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for slot in range(3):
        box = page.locator(f"#editor-{slot} canvas").first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert len(set(COLORS)) == len(COLORS)


def test_an_agents_tool(address, studio):
    client = gradio_client.Client(address, verbose=False)
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/edit_picture"]
    image = gradio_client.handle_file(str(EXAMPLES[2] / "image.png"))
    prompts = ("a cat wearing a straw hat", "a dog wearing a red hat")
    result = client.predict(image, *prompts, "dog=word:cat", "red=box:30,20,100,60", "fast", api_name="/edit_picture")
    assert np.abs(read(result).astype(float) - read(EXAMPLES[2] / "image.png")).mean() > 5
    for objects, message in (
        ("dog=word:horse", "'horse'"),
        ("dog", "Write `objects`"),
        ("dog=here.png", "say word:cat"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(image, *prompts, objects, "", "fast", api_name="/edit_picture")


def test_a_space_runs_on_what_is_pushed(tmp_path):
    for name, data in files_of_space(ROOT).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "GRADIO_SERVER_PORT": port, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        serving = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, env=env, stdout=log, stderr=log)
        try:
            client = connected(f"http://127.0.0.1:{port}", serving, tmp_path / "log")
            image = gradio_client.handle_file(str(EXAMPLES[2] / "image.png"))
            prompts = ("a cat wearing a straw hat", "a dog wearing a straw hat")
            client.predict(image, *prompts, "dog=word:cat", "", "fast", api_name="/edit_picture")
        finally:
            serving.terminate()
            serving.wait()


def connected(address, serving, log):
    """A client of a page that is still being started."""
    for _ in range(120):
        assert serving.poll() is None, log.read_text()
        try:
            return gradio_client.Client(address, verbose=False)
        except Exception:
            time.sleep(1)
    raise AssertionError(log.read_text())


def test_an_edit_can_be_stopped(visit):
    page = visit()
    take_example(page, 2, editors=2)
    button(page, "Edit").click()
    told(page, "edit-status", "Step")
    button(page, "Stop").click()
    told(page, "edit-status", "Stopped.")
    choose_fast(page)  # and the model is free for the next
    button(page, "Edit").click()
    told(page, "edit-status", "Edited in")
