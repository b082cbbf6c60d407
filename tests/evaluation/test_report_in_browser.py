"""The report as a browser shows it: without errors and a network, on a phone, in the dark, by mouse and by keyboard."""

import numpy as np
import pytest

from aib_tf.evaluation import Estimate, Result, Skipped, report
from aib_tf.evaluation.chart import Chart, Line
from tests.evaluation import browser as chromium

pytestmark = pytest.mark.skipif(
    chromium.EXECUTABLE is None, reason="there is no Chromium; Debian and Ubuntu: apt-get install chromium"
)

NASTY = '<img src=x onerror="window.ran = 1"><script>window.ran = 1</script>' + "long" * 40
COUNT = 9


def result(suite, shift):
    values = {name: 0.5 + shift for name in ("top_1", "pointing_box_attention", "pointing_box_uniform")}
    metrics = {name: Estimate(value, value - 0.01, value + 0.01, 100) for name, value in values.items()}
    line = Line(np.linspace(0, 1, 9), np.linspace(0, 1, 9) ** (1 + shift))
    lines = {"attention": line, "uniform": line}
    charts = {kind: Chart("x" * 80, NASTY, lines, kind, diagonal=kind == "line") for kind in ("line", "bar")}
    return Result(suite, 100, 0, 2000, 0, metrics, {"a_list": list(range(50)), "text": NASTY}, charts, {})


@pytest.fixture(scope="module")
def gallery():
    random = np.random.default_rng(0)
    boxes = np.tile([0.25, 0.25, 0.75, 0.75], (COUNT, 1))
    pictures = random.integers(0, 256, (COUNT, 12, 16, 3), np.uint8)
    return report.Gallery(pictures, np.arange(COUNT) % 3, ["zero", "one", NASTY], boxes, 10 * np.arange(COUNT))


def maps(seed, with_attention=True):
    random = np.random.default_rng(seed)
    probabilities = np.full((COUNT, 3), 0.1)
    probabilities[np.arange(COUNT), np.arange(COUNT) % 3] = 0.8
    probabilities[4] = [0.7, 0.2, 0.1]  # the one that is wrong
    if not with_attention:
        return report.GalleryMaps(probabilities)
    attention = random.uniform(0.2, 0.6, (COUNT, 4, 4))
    attention[0] = np.linspace(0.2, 0.6, 16).reshape(4, 4)
    attention[1, 0, 0] = 1.0
    samples, grad_cam = random.uniform(size=(4, COUNT, 4, 4)), random.uniform(size=(COUNT, 3, 3))
    return report.GalleryMaps(probabilities, attention, attention.round(1), samples, grad_cam)


@pytest.fixture(scope="module")
def pages(gallery, tmp_path_factory):
    """Reports of one run, of four, and of twelve that are three seeds of four models."""

    def run(model, seed):
        # A model without attention has no localisation, and its gallery no maps.
        plain = model == 3
        other = Skipped("localisation", NASTY) if plain else result("localisation", model / 10)
        results = {"accuracy": result("accuracy", model / 10), "localisation": other}
        context = {"data": "digits", "folder": f"runs/{NASTY}"}
        return report.RunResults(results, context, maps(seed, not plain), f"model {model} {NASTY}", seed)

    folder = tmp_path_factory.mktemp("reports")
    runs = {(model, seed): run(model, seed) for model in range(4) for seed in range(3)}
    return {
        count: report.write(folder / str(count), {f"{NASTY} {key}": runs[key] for key in keys}, gallery)
        for count, keys in {1: [(0, 0)], 4: [(model, 0) for model in range(4)], 12: list(runs)}.items()
    }


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    browser = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(started):
    """After each test: nothing went wrong in the page, nothing was fetched, and no text from data was run."""
    yield started
    assert started.errors == []
    assert [address for address in started.requests if not address.startswith("file:")] == []
    assert len(started.requests) == 1
    assert started.run("window.ran === undefined")


def opened(browser, path, **options):
    browser.open(path, **options)
    browser.wait_for("!document.getElementById('controls').hidden")


FOCUSED = "document.activeElement.dataset.index ?? document.activeElement.id"
TITLE = "document.getElementById('viewer-title').textContent.slice(0, 9)"
IS_OPEN = "document.getElementById('viewer').open"
# Colour in the middle of the first map of the viewer.
PIXEL = """(() => { const c = document.querySelector('#stage .map canvas');
    return [...c.getContext('2d').getImageData(c.width >> 1, c.height >> 1, 1, 1).data]; })()"""


@pytest.mark.parametrize("count", [1, 4, 12])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_never_wider_than_the_screen(browser, pages, count, width):
    opened(browser, pages[count], width=width, height=740)
    browser.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert browser.run("document.scrollingElement.scrollWidth") <= width
    # Also nothing sticks out to the left, and what is wider scrolls in a box of its own.
    assert browser.run(
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll') && !e.closest('.unseen') &&"
        f" e.getBoundingClientRect().right > {width} + 1).map((e) => e.outerHTML.slice(0, 80))"
    ) == []  # fmt: skip
    browser.click("#grid button")
    assert browser.run(IS_OPEN)
    assert browser.run("document.getElementById('stage').scrollWidth <= document.getElementById('stage').clientWidth")
    assert browser.run("document.getElementById('viewer').getBoundingClientRect().right") <= width
    assert browser.run("document.getElementById('close').getBoundingClientRect().right") <= width


def test_a_click_opens_the_image_with_all_that_was_said_about_it(browser, pages):
    opened(browser, pages[4])
    browser.click("#grid button:nth-child(5)")
    assert browser.run(IS_OPEN)
    assert browser.run(TITLE) == "Image 40 "
    answers = browser.run("[...document.querySelectorAll('.answer')].map((each) => each.innerText)")
    assert len(answers) == 4
    assert "✗ predicts zero, 70.0%" in answers[0] and "Grad-CAM" in answers[0] and "4 samples" in answers[0]
    assert "Attention" not in answers[3] and "70.0%" in answers[3]
    assert browser.run("document.querySelectorAll('.answer:first-child .map').length") == 4
    assert browser.run("document.querySelectorAll('.answer:first-child canvas[role=img]').length") == 7
    browser.click("#close")
    assert not browser.run(IS_OPEN)


def test_grid_and_viewer_are_used_without_a_mouse(browser, pages):
    opened(browser, pages[1], width=1280)
    browser.run("document.querySelector('#grid button').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.run(FOCUSED) == "2"
    browser.press("ArrowLeft")
    browser.press("Enter")
    assert browser.run(IS_OPEN) and browser.run(TITLE) == "Image 10 "
    browser.press("ArrowRight")
    assert browser.run(TITLE) == "Image 20 "
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.run(TITLE) == "Image 80 "  # around the end
    browser.press("Escape")
    assert not browser.run(IS_OPEN)
    browser.wait_for(f"({FOCUSED}) === '8'")  # the image seen last
    browser.press("Home")
    assert browser.run(FOCUSED) == "0"


def test_only_one_image_is_in_the_order_of_the_tab_key(browser, pages):
    opened(browser, pages[1])
    assert browser.run("[...document.querySelectorAll('#grid button')].filter((e) => e.tabIndex === 0).length") == 1
    browser.run("document.getElementById('own').focus()")
    browser.press("Tab")
    assert browser.run(FOCUSED) == "0"


def test_the_arrow_keys_move_down_by_rows(browser, pages):
    opened(browser, pages[1], width=360)
    browser.run("document.querySelector('#grid button').focus()")
    browser.press("ArrowDown")
    columns = int(browser.run(FOCUSED))
    tops = "[...document.querySelectorAll('#grid button')].map((e) => e.offsetTop)"
    assert columns == browser.run(f"{tops}.filter((top, _, all) => top === all[0]).length") > 1


def test_wrong_predictions_are_named_and_can_be_filtered(browser, pages):
    opened(browser, pages[1])
    shown = "[...document.querySelectorAll('#grid button')].filter((e) => !e.hidden)"
    assert browser.run(f"{shown}.length") == COUNT
    browser.click("#filter label:nth-of-type(3)")
    assert browser.run(f"{shown}.map((e) => e.innerText)") == ["✗ zero, is one"]
    assert browser.run(f"{shown}[0].getAttribute('aria-label')") == "Image 40, one, predicted zero, wrong. Open"
    assert browser.run("document.getElementById('hint').textContent").startswith("1 of 9 images.")


def test_maps_share_one_colour_scale_unless_each_is_to_have_its_own(browser, pages):
    opened(browser, pages[1])
    browser.click("#grid button")
    ends = "[...document.querySelectorAll('#stage .map:first-child .scale span')].map((e) => e.textContent)"
    low, high = map(float, browser.run(ends))
    assert low < 0.2 and high == 1.0  # the samples reach further down, another image up to 1
    shared = browser.run(PIXEL)
    browser.click("#viewer-own")
    assert browser.run(ends) == ["0.2", "0.6"]
    # The map of the first image rises evenly: its pixel [2, 2] is the eleventh of sixteen.
    from matplotlib import colormaps

    expected = [round(255 * channel) for channel in colormaps["viridis"](round(255 * 10 / 15))[:3]]
    assert browser.run(PIXEL) == [*expected, 255] != shared


def test_maps_are_drawn_over_the_picture_on_demand(browser, pages):
    opened(browser, pages[1])
    browser.click("#grid button")
    size = "[document.querySelector('#stage .map canvas').width, document.querySelector('#stage .map canvas').height]"
    assert browser.run(size) == [4, 4]
    browser.click("#over")
    assert browser.run(size) == [96, 72]


def test_the_overlay_is_that_of_the_library(browser, pages, gallery):
    from aib_tf.visualization import overlay

    opened(browser, pages[1])
    browser.click("#grid button")
    browser.click("#viewer-own")
    browser.click("#over")
    drawn = browser.run(
        "(() => { const c = document.querySelector('#stage .map canvas');"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    drawn = np.reshape(drawn, (72, 96, 4))[..., :3]
    expected = overlay(np.kron(gallery.pictures[0], np.ones((6, 6, 1), np.uint8)), maps(0).attention[0])
    assert np.abs(drawn - expected.astype(int)).max() <= 3  # eight bits of the map, and rounding


def test_the_box_lies_where_the_object_is(browser, pages):
    opened(browser, pages[1])
    inner, outer = browser.run(
        "['.box', '.picture'].map((s) => { const r = document.querySelector('#grid ' + s).getBoundingClientRect();"
        "return [r.left, r.top, r.right, r.bottom]; })"
    )
    width, height = outer[2] - outer[0], outer[3] - outer[1]
    expected = [outer[0] + width / 4, outer[1] + height / 4, outer[2] - width / 4, outer[3] - height / 4]
    assert inner == pytest.approx(expected, abs=1)


def test_the_grid_shows_the_run_and_the_map_that_are_chosen(browser, pages):
    opened(browser, pages[4])
    kinds = "[...document.querySelectorAll('#kinds label')].map((e) => e.innerText.trim())"
    assert browser.run(kinds) == ["Attention", "Quantized", "Grad-CAM", "Picture"]
    assert browser.run("document.querySelectorAll('#grid canvas').length") == COUNT
    browser.click("#kinds label:nth-of-type(4)")
    assert browser.run("document.querySelectorAll('#grid canvas').length") == 0
    assert browser.run("document.querySelectorAll('#grid img').length") == COUNT
    browser.run("((e) => { e.value = '3'; e.dispatchEvent(new Event('change')); })(document.getElementById('run'))")
    assert browser.run("document.getElementById('kinds').hidden")


def test_the_colours_follow_the_system(browser, pages):
    lightness = (
        "(() => { const s = getComputedStyle(document.querySelector('{}')).{};"
        " return s.match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3; })()"
    )

    def of(element, what):
        return browser.run(lightness.replace("{}", element, 1).replace("{}", what, 1))

    opened(browser, pages[4])
    assert of("body", "backgroundColor") > 230 and of("h1", "color") < 60 and of(".panels text", "fill") < 60
    opened(browser, pages[4], dark=True)
    assert of("body", "backgroundColor") < 40 and of("h1", "color") > 200 and of(".panels text", "fill") > 200
    browser.click("#grid button")
    assert of("#viewer", "backgroundColor") < 40
    # On paper it is light again, and what cannot be used there is left out.
    opened(browser, pages[4], dark=True, media="print")
    assert of("body", "backgroundColor") > 230 and of("h1", "color") < 60
    assert browser.run("getComputedStyle(document.getElementById('controls')).display") == "none"


def test_a_table_that_is_wider_than_the_screen_scrolls_and_keeps_its_labels(browser, pages):
    opened(browser, pages[12], width=360, height=740)
    box = "document.querySelector('[aria-label^=Accuracy]')"
    assert browser.run(f"{box}.scrollWidth > {box}.clientWidth")
    browser.run(f"{box}.scrollLeft = 200")
    left = f"{box}.querySelector('tbody th').getBoundingClientRect().left - {box}.getBoundingClientRect().left"
    assert browser.run(left) == pytest.approx(0, abs=1)


def test_pictures_without_any_model_open_as_well(browser, gallery, tmp_path):
    browser.open(report.write(tmp_path, {"a": report.RunResults({"accuracy": result("accuracy", 0)})}, gallery))
    browser.wait_for("document.getElementById('hint').textContent.startsWith('9 of 9 images.')")
    assert browser.run("document.getElementById('controls').hidden")
    browser.click("#grid button")
    assert browser.run(TITLE) == "Image 0 t"
    assert browser.run("document.querySelectorAll('#stage img').length") == 1


def test_every_control_has_a_name(browser, pages):
    opened(browser, pages[4])
    browser.click("#grid button")
    unnamed = browser.run(
        "[...document.querySelectorAll('button, input, select, [role=img], [role=region]')].filter((e) =>"
        " !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.length || e.innerText))"
        ".map((e) => e.outerHTML.slice(0, 80))"
    )
    assert unnamed == []
