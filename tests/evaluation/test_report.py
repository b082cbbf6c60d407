import base64
import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from aib_tf import evaluation
from aib_tf.evaluation import Estimate, Result, Skipped, report
from aib_tf.evaluation.chart import Chart, Line
from aib_tf.evaluation.report import charts, pictures, summary, tables

NASTY = "<script>alert(\"x\")</script> & 'ünï' 漢字 {{ 7 * 7 }}"


def estimate(value, width=0.01, images=100):
    return Estimate(value, value - width, value + width, images)


def result(suite="accuracy", metrics=None, lines=None, kind="line", **details):
    shown = {} if lines is None else {"curve": Chart("x", "y", lines, kind)}
    return Result(suite, 100, 0, 2000, 0, metrics or {"top_1": estimate(0.9)}, details, shown, {})


def run(*results, **others):
    return report.RunResults({each.suite: each for each in results}, **others)


@pytest.fixture
def gallery():
    random = np.random.default_rng(0)
    return report.Gallery(
        random.integers(0, 256, (3, 8, 8, 1), np.uint8),
        np.array([0, 1, 2]),
        ["zero", "one", NASTY],
        np.tile([0.25, 0.25, 0.75, 0.75], (3, 1)),
        np.array([4, 40, 400]),
    )


@pytest.fixture
def maps():
    random = np.random.default_rng(1)
    return report.GalleryMaps(
        np.eye(3)[[0, 1, 1]],
        attention=random.uniform(size=(3, 4, 4)),
        quantized=np.ones((3, 4, 4)),
        samples=random.uniform(size=(2, 3, 4, 4)),
        grad_cam=random.uniform(size=(3, 2, 2)),
    )


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with attributes, texts without scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        if not {"script", "style"} & set(self.open[-1:]):
            self.texts.append(text)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def rows(self):
        """Texts between the starts of table rows."""
        return self.text


def written(folder, *arguments, **options):
    return Page(report.write(folder, *arguments, **options))


def test_a_report_is_one_page_and_the_numbers_and_names_no_other_file(tmp_path, gallery, maps):
    lines = {"a": Line([0, 1], [0, 1], [0, 0.9], [0.1, 1])}
    path = report.write(tmp_path / "new" / "report", {"a": run(result(lines=lines), maps=maps)}, gallery)
    assert sorted(each.name for each in path.parent.iterdir()) == ["index.html", "metrics.json"]
    page = Page(path)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            address = attributes.get(name) or ""
            assert address == "" or address.startswith(("#", "data:")), (tag, attributes)
    assert "://" not in path.read_text(encoding="utf-8")


def test_the_numbers_stand_in_the_json_file(tmp_path):
    found = run(result(steps=20), Skipped("transfer", "why"), context={"epoch": 3}, group="model", seed=1)
    report.write(tmp_path, {"a": found})
    data = json.loads((tmp_path / "metrics.json").read_text())["runs"]["a"]
    assert (data["group"], data["seed"], data["context"]) == ("model", 1, {"epoch": 3})
    assert data["suites"]["accuracy"]["metrics"]["top_1"]["value"] == 0.9
    assert data["suites"]["transfer"] == {"suite": "transfer", "skipped": "why"}


def test_one_run_shows_value_interval_and_count(tmp_path):
    metrics = {"top_1": Estimate(0.9, 0.85, 0.94, 1234), "nll_bits": Estimate(-0.0, -1.0, 1.0, 1)}
    page = written(tmp_path, {"a": run(result(metrics=metrics))})
    assert "Top-1 0.900 0.850 to 0.940 1,234" in page.text
    assert "NLL, bits" in page.text


def test_endings_that_name_a_map_become_columns_of_one_row():
    metrics = {f"pointing_box_{of}": estimate(place / 10) for place, of in enumerate(reversed(tables.MAPS))}
    plain, maps, rows = tables.single(result(metrics={"uniform": estimate(0.5), **metrics}))
    assert [row.metric for row in plain] == ["uniform"]  # a name that is nothing but a map's is a metric's
    assert maps == ["Attention", "Grad-CAM", "Uniform", "Centred"]
    assert [row.label for row in rows] == ["Pointing, box"]
    assert [cell.value for cell in rows[0].cells] == ["0.300", "0.200", "0.100", "0.000"]


def test_a_map_that_a_metric_lacks_leaves_its_cell_empty():
    _, maps, (first, second) = tables.single(
        result(metrics={"a_attention": estimate(1), "a_uniform": estimate(1), "b_uniform": estimate(1, images=7)})
    )
    assert maps == ["Attention", "Uniform"]
    assert (first.images, second.images) == (100, 7)
    assert second.cells[0] is None and second.cells[1].images == 7


@pytest.mark.parametrize(
    ("low", "high", "mark"),
    [(0.911, 0.93, "above"), (0.91, 0.93, ""), (0.87, 0.89, ""), (0.87, 0.8899, "below"), (0.7, 0.99, "")],
)
def test_a_difference_is_marked_where_the_intervals_have_no_value_in_common(low, high, mark):
    first = Estimate(0.9, 0.89, 0.91, 100)
    other = Estimate((low + high) / 2, low, high, 100)
    (row,) = tables.several([result(metrics={"top_1": first}), result(metrics={"top_1": other}), None])
    assert [cell and cell.mark for cell in row.cells] == ["", mark, None]


def test_nothing_is_marked_where_the_first_run_has_no_such_metric():
    (row,) = tables.several([result(metrics={}), result(metrics={"b": estimate(3)})])[-1:]
    assert row.cells[0] is None and row.cells[1].mark == ""


def test_a_mark_says_in_words_what_it_means(tmp_path):
    page = written(tmp_path, {"a": run(result()), "b": run(result(metrics={"top_1": estimate(0.5)}))})
    assert "▼ below a" in page.text


def test_runs_stand_side_by_side_with_a_row_for_each_map():
    both = [result(metrics={"x_centred": estimate(1), "top_1": estimate(1), "x_attention": estimate(2)})] * 2
    rows = tables.several(both)
    assert [(row.label, row.map, row.span, len(row.cells)) for row in rows] == [
        ("Top-1", "", 1, 2), ("X", "Attention", 2, 2), ("X", "Centred", 0, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "low", "high", "texts"),
    [
        (0.98651, 0.98151, 0.99149, ["0.9865", "0.9815", "0.9915"]),
        (24.05, 23.7, 24.3, ["24.05", "23.70", "24.30"]),
        (20.0, 18.0, 20.0, ["20", "18", "20"]),
        (0.123456, 0.123456, 0.123456, ["0.1235"] * 3),
        (12345.6, 11000.4, 13000.2, ["12,346", "11,000", "13,000"]),
        (-0.001, -0.2, 0.2, ["0.00", "−0.20", "0.20"]),
        (float("nan"), 0.0, 1.0, ["–", "0.00", "1.00"]),
        (3e-9, 1e-9, 5e-9, ["3e−09", "1e−09", "5e−09"]),
    ],
)
def test_numbers_have_as_many_decimals_as_their_interval_is_exact(value, low, high, texts):
    assert tables.numbers(value, low, high) == texts


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (2000, "2,000"), (0.25, "0.25"), (1e-7, "1e−07"), ([1, 2.5, "x"], "1, 2.5, x"), ({"a": 1}, "a: 1"),
     (list(range(30)), ", ".join(map(str, range(24))) + ", … (30 in all)"), (float("inf"), "–"), (None, "None")],
)  # fmt: skip
def test_details_become_texts(value, text):
    assert tables.plain(value) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("top_1", "Top-1"),
        ("nll_bits", "NLL, bits"),
        ("auc_judd", "AUC-Judd"),
        ("bits", "Bits"),
        ("pgd_4", "PGD 4"),
        ("nll_bits_drawn_4", "NLL, bits, 4 draws"),
    ],
)
def test_names_of_metrics_become_words(name, text):
    assert tables.label(name) == text


def test_the_mean_and_range_over_seeds_are_of_the_runs_that_have_the_number():
    over = summary.over_seeds([estimate(0.9), None, estimate(0.93)])
    assert (over.mean, over.low, over.high, over.runs) == ("0.915", "0.900", "0.930", 2)
    assert summary.over_seeds([None, None]) is None


def test_seeds_of_one_model_stand_together_with_their_mean(tmp_path):
    runs = {
        f"{model}-{seed}": run(result(metrics={"top_1": estimate(0.9 + seed / 100)}), group=model, seed=seed)
        for seed in (0, 1, 2)
        for model in ("a", "b")
    }
    page = written(tmp_path, runs)
    assert "6 runs of 2 models" in page.text
    assert "a mean and range of 3 runs 0.910 0.900 to 0.920 a-0 0.900" in page.text
    assert "a b seed 0 seed 1 seed 2 seed 0 seed 1 seed 2 Top-1" in page.text


def test_key_figures_are_one_of_each_suite_before_any_has_two():
    found = {name: result(name, {"first": estimate(1), "second": estimate(2)}) for name in "abcdefghij"}
    found["accuracy"] = result(metrics={"top_5": estimate(1), "ece": estimate(1), "top_1": estimate(1)})
    assert len(summary.keys([found])) == 8
    keys = summary.keys([{"accuracy": found["accuracy"], "own": found["a"]}])
    assert [(key.suite, key.metric) for key in keys] == [("accuracy", "top_1"), ("accuracy", "ece"), ("own", "first")]


def test_the_summary_says_how_attention_compares_with_the_baselines():
    metrics = {
        "pointing_box_attention": estimate(0.8),
        "pointing_box_grad_cam": estimate(0.81),
        "pointing_box_uniform": estimate(0.1),
        "pointing_box_centred": estimate(0.9),
    }
    said = summary.sentences({"a": {"localisation": result("localisation", metrics)}}, {"a": "a"})
    assert said == [
        "Pointing, box: attention 0.800, above uniform (0.100) beyond the intervals, below centred (0.900) beyond the "
        "intervals, not told apart from Grad-CAM (0.810)."
    ]


def test_the_summary_of_one_run_says_accuracy_and_bits():
    metrics = {"rate_bits": estimate(24.0, 0.5), "label_information_bits": estimate(3.0, 0.1)}
    results = {"accuracy": result(), "bottleneck": result("bottleneck", metrics, label_entropy_bits=3.25)}
    assert summary.sentences({"a": results}, {"a": "a"}) == [
        "90.0% of 100 images are classified correctly (95% interval 89.0% to 91.0%).",
        "The representation holds at most 24.00 bits about the image, and at least 3.00 of the 3.25 bits about its "
        "label.",
    ]


def test_the_summary_of_several_runs_counts_the_differences_from_the_first():
    first = result(metrics={"top_1": estimate(0.9), "ece": estimate(0.1), "only_here": estimate(1)})
    other = result(metrics={"top_1": estimate(0.5), "ece": estimate(0.11)})
    said = summary.sentences({"a": {"accuracy": first}, "b": {"accuracy": other}}, {"a": "a", "b": "b"})
    assert said == [
        "2 runs, compared with a. Of the 2 figures that can be compared, 1 differs beyond the 95% intervals.",
        "Top-1: lowest with b (0.500), highest with a (0.900).",
        "No two runs differ beyond the intervals in: ECE.",
    ]


def test_of_many_metrics_the_first_are_shown_and_the_rest_folded_away(tmp_path):
    metrics = {name: estimate(0.5) for name in ("kept_window_4", "kept_spatial", "score_90_low_pass_4_attention",
                                                "score_90_frequency_attention")}  # fmt: skip
    for count in (1, 2):
        page = written(tmp_path / str(count), {str(i): run(result("consistency", metrics)) for i in range(count)})
        shown, folded = page.text.split("2 further metrics")
        shown = shown.split("prediction is not.")[1]
        assert "Kept spatial" in shown and "Score 90 frequency" in shown
        assert "Kept window 4" not in shown and "Score 90 low pass 4" not in shown
        assert "Kept window 4" in folded and "Score 90 low pass 4" in folded


def test_a_suite_has_its_verdicts_above_its_tables(tmp_path):
    found = {
        "a": result("robustness", gradient_check="broken: PGD is weaker than noise", gradient_checks=3),
        "b": result("robustness", gradient_check="sound"),
        "c": result("robustness", gradient_check="sound"),
    }
    assert summary.verdicts(found) == [
        "Gradient check (a): broken: PGD is weaker than noise.", "Gradient check (b and c): sound."
    ]  # fmt: skip
    assert summary.verdicts({"b": found["b"]}) == ["Gradient check: sound."]
    page = written(tmp_path, {"a": run(found["a"])})
    assert "Gradient check: broken: PGD is weaker than noise. Value 95% interval" in page.text


def test_what_was_not_measured_is_named_with_the_reason(tmp_path):
    runs = {
        "a": run(result(), Skipped("localisation", "the data has no boxes"), Skipped("transfer", "no target")),
        "b": run(result(), result("localisation", {"x": estimate(1)})),
        "c": run(result("localisation", {"x": estimate(1)})),
    }
    page = written(tmp_path, runs)
    assert "Not measured: Transfer , no target." in page.text
    assert "Not measured for a: the data has no boxes." in page.text
    assert "Not measured for c: it was not asked for." in page.text


def test_only_skipped_suites_make_a_page_too(tmp_path):
    page = written(tmp_path, {"a": run(Skipped("accuracy", "why"))})
    assert "Not measured: Accuracy , why." in page.text
    assert "table" not in dict(page.tags)


def test_what_all_runs_share_stands_at_the_top_and_the_rest_in_a_table(tmp_path):
    runs = {"a": run(result(), context={"data": "digits", "epoch": 1}), "b": run(result(), context={"data": "digits"})}
    page = written(tmp_path, runs)
    assert "Data digits Summary" in page.text.replace("Accuracy ", "", 1)
    assert "The runs Epoch a 1 b" in page.text


def test_text_from_data_stays_text(tmp_path, gallery, maps):
    lines = {NASTY: Line([0, 1], [0, 1]), "b": Line([0, 1], [0, 1])}
    nasty = run(result(lines=lines, text=NASTY), Skipped("transfer", NASTY), context={NASTY: NASTY}, maps=maps)
    path = report.write(tmp_path, {NASTY: nasty, "b": nasty}, gallery, title=NASTY, note=NASTY)
    page = Page(path)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert path.read_text(encoding="utf-8").count("</script>") == 2
    assert page.text.count(NASTY) > 10
    assert "49" not in page.text
    data = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert [each["name"] for each in json.loads(data)["runs"]] == [NASTY, "b"]
    assert "<" not in data


def test_only_the_own_script_may_run(tmp_path, gallery, maps):
    path = report.write(tmp_path, {"a": run(result(), maps=maps)}, gallery)
    policy = next(a["content"] for tag, a in Page(path).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)


def test_the_same_results_give_the_same_files(tmp_path, gallery, maps):
    lines = {"a": Line([0, 1], [0, 1]), "b": Line([0, 1], [1, 0])}
    for name in ("first", "second"):
        report.write(tmp_path / name, {"a": run(result(lines=lines), maps=maps), "b": run(result())}, gallery)
    for name in ("index.html", "metrics.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_number_that_json_cannot_hold_leaves_an_older_report_as_it_was(tmp_path):
    report.write(tmp_path, {"a": run(result())})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="JSON"):
        report.write(tmp_path, {"a": run(result(metrics={"top_1": estimate(float("nan"))}))})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_lines_of_one_run_share_a_panel_and_lines_of_several_have_one_each():
    chart = Chart("x", "y", {"attention": Line([0, 1], [0, 1]), "centred": Line([0, 1], [0, 1])})
    one = charts.figure("i", "t", {"a": chart}, {"a": "a"}, tables.label)
    assert [panel.title for panel in one.panels] == [""]
    assert [(series.label, series.number) for series in one.series] == [("Attention", 0), ("Centred", 1)]
    two = charts.figure("i", "t", {"a": chart, "c": chart}, {"a": "m", "b": "n", "c": "o"}, tables.label)
    assert [panel.title for panel in two.panels] == ["Attention", "Centred"]
    assert [(series.label, series.number) for series in two.series] == [("m", 0), ("o", 2)]


def test_a_chart_of_one_of_several_runs_names_it_and_keeps_its_colour():
    chart = Chart("x", "y", {"line": Line([0, 1], [0, 1])})
    drawn = charts.figure("i", "t", {"b": chart}, {"a": "a", "b": "b"}, tables.label)
    assert drawn.note == "b"
    assert "--series-2" in drawn.panels[0].svg and "--series-1" not in drawn.panels[0].svg


def test_charts_take_their_colours_from_the_page_and_have_a_title():
    chart = Chart("<x> & $y$", "y", {"a": Line([0, 1], [0, 1], [0, 0], [1, 1])}, diagonal=True)
    (panel,) = charts.figure("i", "Title <t>", {"a": chart}, {"a": "a"}, tables.label).panels
    root = ElementTree.fromstring(panel.svg)
    assert root.find("title").text == "Title <t>"
    assert root.get("aria-labelledby") == root.find("title").get("id") == "i-0-title"
    assert "<x> & $y$" in [text.text for text in root.iter("text")]
    styles = " ".join(element.get("style", "") for element in root.iter())
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", styles)) == set()
    assert {"var(--series-1, #0072b2)", "currentColor"} <= set(re.findall(r"(?:fill|stroke): ([^;]+)", styles))
    assert "font-family" not in styles
    assert root.find(".//style") is None


def test_ids_of_all_charts_of_a_page_differ(tmp_path):
    lines = {"a": Line([0, 1], [0, 1]), "b": Line([0, 1], [1, 0])}
    runs = {name: run(result(lines=lines), result("other", lines=lines)) for name in "ab"}
    page = written(tmp_path, runs)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {address[1:] for _, a in page.tags for address in [a.get("href", "")] if address.startswith("#")}
    used |= {name for _, a in page.tags for name in re.findall(r"url\(#([^)]+)\)", a.get("clip-path", ""))}
    assert used and used <= set(ids)


def test_histograms_of_the_runs_of_a_model_are_averaged():
    lines = [("m", Line([0, 1], [0, 1])), ("n", Line([0, 1], [5, 5])), ("m", Line([0, 1], [1, 3]))]
    assert [(group, line.y) for group, line in charts._means(lines)] == [("m", [0.5, 2.0]), ("n", [5.0, 5.0])]
    apart = [("m", Line([0, 1], [0, 1])), ("m", Line([0, 2], [1, 3]))]
    assert charts._means(apart) == apart


@pytest.mark.parametrize("kind", ["line", "bar"])
@pytest.mark.parametrize(
    "line",
    [Line([], []), Line([3], [2]), Line([3], [2], [1], [3]), Line([0, 1], [np.nan, np.nan]), Line([0, 1], [2, 2])],
)
def test_charts_of_a_point_of_a_constant_or_of_nothing_are_drawn(kind, line):
    for names in (["a"], ["a", "b"]):
        drawn = charts.figure(
            "i", "t", dict.fromkeys(names, Chart("x", "y", {"l": line}, kind)), {"a": "a", "b": "b"}, str
        )
        assert ElementTree.fromstring(drawn.panels[0].svg).tag == "svg"


def test_bins_reach_to_the_middles_between_their_places():
    np.testing.assert_array_equal(charts._edges(np.array([0.0, 2.0, 3.0])), [-1, 1, 2.5, 3.5])
    np.testing.assert_array_equal(charts._edges(np.array([5.0])), [4.5, 5.5])


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.write(tmp_path, {"a": run(result(lines={"a": Line([0, 1], [0, 1])}))})
    assert dict(matplotlib.rcParams) == before


def test_a_map_keeps_eight_bits_of_its_own_range():
    maps = np.stack([np.linspace(0, 1, 16).reshape(4, 4), np.linspace(0.5, 0.501, 16).reshape(4, 4), np.ones((4, 4))])
    found = pictures.encode_maps(maps)
    assert (found["height"], found["width"], found["count"]) == (4, 4, 3)
    values = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(3, 4, 4) / 255
    low, high = (np.array(found[name])[:, None, None] for name in ("low", "high"))
    decoded = low + values * (high - low)
    assert (np.abs(decoded - maps).max(axis=(1, 2)) <= [0.5001 / 255, 0.5001 * 0.001 / 255 + 1e-6, 0]).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pictures_are_whole_and_large_ones_are_made_smaller(channels, mode):
    import io

    from PIL import Image

    small = np.arange(32 * channels, dtype=np.uint8).reshape(1, 4, 8, channels)
    large = np.zeros((1, 300, 600, channels), np.uint8)
    found = []
    for picture in (small, large):
        (address,) = pictures.encode_pictures(picture)
        found.append(Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))))
    assert found[0].mode == mode
    np.testing.assert_array_equal(np.asarray(found[0]).reshape(small[0].shape), small[0])
    assert found[1].size == (256, 128)


def test_the_choice_holds_wrong_ones_and_all_classes():
    labels = np.tile(np.arange(10), 100)
    right = np.ones(1000, bool)
    right[::250] = False
    chosen = pictures.choose(labels, right, 36)
    assert len(set(chosen)) == 36 and (np.diff(chosen) > 0).all()
    assert (~right[chosen]).sum() == 4  # all there are
    assert set(labels[chosen]) == set(range(10))
    right[::2] = False
    assert (~right[pictures.choose(labels, right, 36)]).sum() == 9  # a quarter


@pytest.mark.parametrize(
    ("right", "count", "chosen"),
    [
        ([True], 5, [0]),
        ([False], 1, [0]),
        ([False, True], 1, [1]),
        ([False] * 6, 3, [1, 3, 5]),
        ([True] * 4, 9, range(4)),
    ],
)
def test_small_choices(right, count, chosen):
    assert pictures.choose(np.zeros(len(right), int), np.array(right), count).tolist() == list(chosen)


@pytest.fixture
def numbered(fake_model):
    """A model that explains image i by row i."""
    random = np.random.default_rng(2)
    return fake_model(
        logits=np.eye(3)[[0, 1, 2, 0, 0, 2]] * 9,
        attention_mean=np.arange(6.0)[:, None, None] + np.zeros((6, 2, 2)),
        attention_stddev=np.ones((6, 2, 2)),
        attention_quantized=random.uniform(size=(6, 2, 2, 2)),
    )


def test_a_gallery_takes_pictures_maps_and_probabilities_of_the_images_named(numbered, batched):
    boxes = np.tile([0, 0, 0.5, 1], (6, 1))
    subject = evaluation.Subject(numbered, mean=0.5, stddev=255.0)
    shown, said = report.gallery(subject, batched([0, 1, 2, 0, 1, 2], 4, bbox=boxes), indices=[1, 4, 5], samples=2)
    np.testing.assert_array_equal(shown.indices, [1, 4, 5])
    np.testing.assert_array_equal(shown.labels, [1, 1, 2])
    np.testing.assert_array_equal(shown.boxes, boxes[:3])
    # (number * 255 + 0.5) * 255, clipped: the fake images are numbers, not normalised pixels.
    assert shown.pictures.shape == (3, 8, 8, 1) and (shown.pictures == 255).all()
    np.testing.assert_array_equal(said.probabilities.argmax(axis=1), [1, 0, 2])
    np.testing.assert_allclose(said.probabilities.sum(axis=1), 1)
    np.testing.assert_array_equal(said.attention[:, 0, 0], [1, 4, 5])
    assert said.samples.shape == (2, 3, 2, 2)
    np.testing.assert_array_equal(said.quantized, numbered.tables["attention_quantized"][[1, 4, 5], 0])
    assert said.grad_cam is None


def test_a_gallery_chooses_for_itself(numbered, batched):
    shown, said = report.gallery(numbered, batched([0, 1, 2, 0, 1, 2], 4), count=4, class_names=["a", "b", "c"])
    assert len(shown.labels) == 4
    assert (said.probabilities.argmax(axis=1) != shown.labels).sum() == 1  # the only one that is wrong
    fewer, said_of_fewer = report.gallery(numbered, batched([0, 1, 2, 0, 1, 2], 4), count=3)
    assert (said_of_fewer.probabilities.argmax(axis=1) == fewer.labels).all()  # a quarter of three is none
    assert shown.boxes is None and shown.class_names == ["a", "b", "c"]


def test_a_gallery_of_a_plain_model_has_probabilities_alone(fake_model, batched):
    _, said = report.gallery(fake_model(logits=np.eye(3)), batched([0, 1, 2]))
    assert said.attention is said.quantized is said.samples is said.grad_cam is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"samples": -1}, "samples=-1"),
        ({"indices": [2, 1]}, r"ascending.*\[2, 1\]"),
        ({"indices": []}, "ascending"),
        ({"indices": [0, 6]}, "2 indices up to 6, of which 1 are there"),
    ],
)
def test_impossible_choices_are_refused(numbered, batched, options, message):
    with pytest.raises(ValueError, match=message):
        report.gallery(numbered, batched([0, 1, 2, 0, 1, 2]), **options)


def test_a_data_set_that_cannot_be_read_again_needs_indices(numbered, batched):
    with pytest.raises(ValueError, match=r"read twice.*dataset=list_iterator"):
        report.gallery(numbered, iter(batched([0, 1])))
    shown, _ = report.gallery(numbered, iter(batched([0, 1])), indices=[1])
    assert shown.labels.tolist() == [1]
    with pytest.raises(ValueError, match="no images"):
        report.gallery(numbered, [])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pictures": np.zeros((3, 8, 8, 2), np.uint8)}, ValueError, r"shape=\(3, 8, 8, 2\)"),
        ({"pictures": np.zeros((0, 8, 8, 1), np.uint8)}, ValueError, r"shape=\(0, 8, 8, 1\)"),
        ({"pictures": np.zeros((3, 8, 8, 1))}, TypeError, "dtype=float64"),
        ({"labels": [0, 1]}, ValueError, r"labels must be 3 integers.*\(2,\)"),
        ({"labels": [0.0, 1, 2]}, ValueError, "dtype=float64"),
        ({"labels": [0, 1, 3]}, ValueError, "names=3"),
        ({"labels": [0, -1, 2]}, ValueError, "from -1"),
        ({"boxes": np.zeros((3, 2))}, ValueError, r"shape=\(3, 2\)"),
        ({"indices": [1]}, ValueError, "indices must be 3 integers"),
    ],
)
def test_impossible_galleries_are_refused(gallery, change, error, message):
    with pytest.raises(error, match=message):
        report.Gallery(**{**vars(gallery), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": np.zeros(3)}, r"probabilities must.*shape=\(3,\)"),
        ({"attention": np.zeros((2, 4, 4))}, r"attention must have shape \(3, h, w\).*\(2, 4, 4\)"),
        ({"samples": np.zeros((3, 2, 4, 4))}, r"samples must have shape \(n, 3, h, w\)"),
        ({"grad_cam": np.full((3, 2, 2), np.nan)}, "grad_cam must be finite.*values=12 of 12"),
    ],
)
def test_impossible_maps_are_refused(maps, change, message):
    with pytest.raises(ValueError, match=message):
        report.GalleryMaps(**{**vars(maps), **change})


def test_maps_without_their_gallery_are_refused(tmp_path, gallery, maps):
    with pytest.raises(ValueError, match="run='a', images=3 beside 0"):
        report.write(tmp_path, {"a": run(result(), maps=maps)})
    fewer = report.GalleryMaps(np.eye(2)[[0, 1, 1]])
    with pytest.raises(ValueError, match="classes=2 beside 3 names"):
        report.write(tmp_path, {"a": run(result(), maps=fewer)}, gallery)
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        report.write(tmp_path, {})
