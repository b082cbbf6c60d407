import json
import time

import numpy as np
import pytest

from aib_tf import evaluation
from aib_tf.evaluation import report


@pytest.fixture
def full_model(fake_model):
    random = np.random.default_rng(0)
    anchors = np.linspace(0, 1, 4)
    return fake_model(
        anchors,
        logits=random.normal(size=(9, 6)),
        kl=random.uniform(20, 30, size=9),
        attention_mean=random.uniform(size=(9, 4, 4)),
        attention_quantized=random.choice(anchors, size=(9, 1, 4, 4)),
    )


BOXES = np.tile([0.25, 0.25, 0.75, 0.75], (9, 1))


QUICK = ["accuracy", "bottleneck", "localisation"]


def test_suites_together_find_what_they_find_alone(full_model, batched):
    dataset = batched(np.arange(9) % 6, 4, bbox=BOXES)
    results = evaluation.evaluate(full_model, dataset, QUICK)
    assert list(results) == QUICK
    for name in QUICK:
        alone = getattr(evaluation, name)(full_model, iter(dataset))  # one suite reads the data once
        assert alone.to_dict() == results[name].to_dict()


def test_several_suites_need_data_that_can_be_read_again(full_model, batched):
    with pytest.raises(ValueError, match=r"read again.*dataset=list_iterator"):
        evaluation.evaluate(full_model, iter(batched([0])), QUICK)


def test_a_plain_model_is_measured_and_the_rest_skipped_with_reasons(fake_model, batched):
    model = fake_model(logits=np.eye(3))
    results = evaluation.evaluate(model, batched([0, 1, 2], bbox=BOXES[:3]), QUICK)
    assert results["accuracy"]["top_1"].value == 1
    assert results["bottleneck"].reason == "the model has no information bottleneck"
    assert results["localisation"].reason == "the model has no attention"


def test_a_suite_that_is_asked_for_alone_is_not_skipped(fake_model, batched):
    with pytest.raises(evaluation.UnavailableError, match="no attention"):
        evaluation.evaluate(fake_model(logits=np.eye(3)), batched([0, 1, 2], bbox=BOXES[:3]), ["localisation"])


def test_only_values_per_image_are_kept(full_model, batched):
    results = evaluation.evaluate(full_model, batched(np.arange(9) % 6, 4, bbox=BOXES), QUICK)
    for result in results.values():
        assert {len(values) for values in result.per_image.values()} == {9}
        assert max(values.size for values in result.per_image.values()) <= 9 * 40


def test_two_thousand_images_are_summarised_within_seconds(fake_model, batched):
    random = np.random.default_rng(0)
    n, anchors = 2_000, np.linspace(0, 1, 20)
    model = fake_model(
        anchors,
        logits=random.normal(size=(n, 10)),
        kl=np.ones(n),
        attention_mean=random.uniform(size=(n, 16, 16)),
        attention_quantized=random.choice(anchors, size=(n, 1, 16, 16)),
    )
    boxes = np.tile([0.25, 0.25, 0.75, 0.75], (n, 1))
    dataset = batched(np.arange(n) % 10, size=32, bbox=boxes, mask=np.ones((n, 32, 32, 1), bool))
    start = time.process_time()
    evaluation.evaluate(model, dataset, QUICK)
    assert time.process_time() - start < 20  # in truth about 2, on an idle machine


@pytest.mark.parametrize("suites", [["acuracy"], [], ["accuracy", "accuracy"]])
def test_impossible_suites_are_answered_with_what_exists(full_model, suites):
    with pytest.raises(ValueError, match="accuracy, consistency, localisation"):
        evaluation.evaluate(full_model, [], suites)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"samples": -1}, "samples=-1"), ({"resamples": 0}, "resamples=0"), ({"seed": -1}, "seed=-1")],
)
def test_impossible_numbers_are_refused_before_the_data_is_read(full_model, options, message):
    def untouched():
        raise AssertionError("the data was read")
        yield

    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(full_model, untouched(), ["accuracy"], **options)


def test_a_wrong_option_is_refused_before_the_first_suite_is_measured(full_model, batched):
    with pytest.raises(ValueError, match="epsilon"):
        evaluation.evaluate(
            full_model, batched([0]), ["accuracy", "robustness"], options={"robustness": {"epsilons": (-1,)}}
        )
    assert full_model.calls == []


def test_an_empty_data_set_is_refused(full_model, batched):
    with pytest.raises(ValueError, match="no images"):
        evaluation.evaluate(full_model, [])
    with pytest.raises(ValueError, match="no images"):
        evaluation.evaluate(full_model, [(np.zeros((0, 8, 8, 1)), np.zeros(0, int))], QUICK)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((np.zeros((8, 8, 1)), np.array([0])), ValueError, r"shape=\(8, 8, 1\)"),
        ((np.zeros((2, 8, 8, 1)), np.array([0])), ValueError, r"shape \(2,\).*shape=\(1,\)"),
        ((np.zeros((1, 8, 8, 1)), np.array([0.0])), ValueError, "dtype=float64"),
        (np.zeros((1, 8, 8, 1)), TypeError, "type=ndarray"),
        ({"image": 1, "target": 2}, TypeError, r"keys=\['image', 'target'\]"),
    ],
)
def test_batches_of_another_form_are_refused(full_model, batch, error, message):
    with pytest.raises(error, match=message):
        evaluation.evaluate(full_model, [batch])


def test_a_model_without_explain_is_refused(batched):
    with pytest.raises(TypeError, match="model=object"):
        evaluation.evaluate(object(), batched([0]))


def test_maps_of_another_shape_are_refused(fake_model, batched):
    with pytest.raises(ValueError, match=r"3 axes.*shape=\(1, 2, 2, 1\)"):
        evaluation.localisation(fake_model(attention_mean=np.ones((1, 2, 2, 1))), batched([0], bbox=[[0, 0, 1, 1]]))


def test_an_unknown_metric_is_answered_with_what_exists(full_model, batched):
    with pytest.raises(KeyError, match="top_1, top_5"):
        evaluation.accuracy(full_model, batched(np.arange(9) % 6))["top1"]


def test_the_table_aligns_its_columns_and_says_what_was_skipped(fake_model, batched):
    model = fake_model(logits=np.eye(3), kl=[2000.0, 2000.0, 2000.0])
    text = report.table(evaluation.evaluate(model, batched([0, 1, 2]), QUICK))
    lines = text.split("\n")
    table = lines[: lines.index("")]
    assert len({len(line) for line in table}) == 1
    assert lines[0].split() == ["suite", "metric", "value", "95%", "interval", "images"]
    assert any(line.split() == ["accuracy", "top", "1", "1.0000", "1.0000", "to", "1.0000", "3"] for line in lines)
    assert "2,885.4" in text
    assert lines[-1] == "localisation: skipped, the data has neither boxes nor masks"
    assert report.table(evaluation.Skipped("accuracy", "why")) == "accuracy: skipped, why"


def test_the_json_file_holds_numbers_intervals_and_reasons(full_model, batched, tmp_path):
    results = evaluation.evaluate(full_model, batched(np.arange(9) % 6), QUICK)
    report.write_json(tmp_path / "metrics.json", results, run="runs/a", epoch=3)
    data = json.loads((tmp_path / "metrics.json").read_text())
    assert (data["run"], data["epoch"]) == ("runs/a", 3)
    top_1 = data["suites"]["accuracy"]["metrics"]["top_1"]
    assert set(top_1) == {"value", "low", "high", "images"}
    assert data["suites"]["accuracy"]["interval"]["resamples"] == 2000
    assert data["suites"]["localisation"] == {
        "suite": "localisation",
        "skipped": "the data has neither boxes nor masks",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
