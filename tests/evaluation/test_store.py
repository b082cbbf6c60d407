import keras
import numpy as np
import pytest
import tensorflow as tf

from aib_tf import evaluation
from aib_tf.evaluation import suite
from tests.evaluation.conftest import make_tiny_model


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture
def dataset():
    images = np.random.default_rng(0).normal(size=(7, 8, 8, 1)).astype(np.float32)
    return [(images[:4], np.array([0, 1, 2, 0])), (images[4:], np.array([1, 2, 0]))]


@pytest.fixture
def counted(monkeypatch):
    """Names of the suites that were measured."""
    measured, run = [], suite.run

    def counting(subject, dataset, kind, *arguments, **keywords):
        measured.append(kind.name)
        return run(subject, dataset, kind, *arguments, **keywords)

    monkeypatch.setattr(suite, "run", counting)
    return measured


def test_an_interrupted_evaluation_goes_on_with_the_next_suite(model, dataset, tmp_path, counted):
    suites = ["accuracy", "bottleneck"]

    def stop(name, done, total):
        if name == "bottleneck":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(model, dataset, suites, folder=tmp_path, progress=stop)
    assert counted == suites
    results = evaluation.evaluate(model, dataset, suites, folder=tmp_path)
    assert counted == [*suites, "bottleneck"]
    fresh = evaluation.evaluate(model, dataset, suites)
    for name in suites:
        assert results[name].to_dict() == fresh[name].to_dict()
        assert results[name].per_image.keys() == fresh[name].per_image.keys()
        for key, values in fresh[name].per_image.items():
            np.testing.assert_array_equal(results[name].per_image[key], values)


def test_what_was_made_otherwise_is_measured_again(model, dataset, tmp_path, counted):
    def evaluate(model=model, dataset=dataset, **arguments):
        counted.clear()
        evaluation.evaluate(model, dataset, ["bottleneck"], folder=tmp_path, **arguments)
        return bool(counted)

    def saturated():
        """The same names and weights, and other numbers."""
        other = make_tiny_model()
        other.features.layers[0].activation = keras.activations.tanh
        return other

    as_tensors = tf.data.Dataset.from_generator(
        lambda: dataset, (tf.float32, tf.int64), (tf.TensorShape((None, 8, 8, 1)), tf.TensorShape((None,)))
    ).apply(tf.data.experimental.assert_cardinality(2))
    assert evaluate()
    assert not evaluate()
    assert evaluate(samples=1)
    assert evaluate(options={"bottleneck": {"history": {"rate_bits": [1.0]}}})
    assert not evaluate(options={"bottleneck": {"history": {"rate_bits": np.array([1.0])}}})
    assert evaluate(dataset=dataset[1:])
    assert evaluate(dataset=as_tensors)
    assert not evaluate(dataset=as_tensors)
    assert evaluate(dataset=as_tensors.take(1))
    assert evaluate(model=make_tiny_model(seed=1))
    assert evaluate(model=saturated())
    assert evaluate()
    assert evaluate(model=evaluation.Subject(model, mean=0.5))
    assert evaluate(model=evaluation.Subject(model, probabilities=True))
    assert evaluate(model=evaluation.Subject(model, maps=lambda images: images[..., 0]))
    assert evaluate(model=evaluation.Subject(model, maps=lambda images: images[..., 0]))


def test_texts_beside_the_images_do_not_hinder(model, dataset, tmp_path, counted):
    def with_names():
        return [
            {"image": images, "label": labels, "id": np.array([f"number {label}" for label in labels], object)}
            for images, labels in dataset
        ]

    for _ in range(2):
        evaluation.evaluate(model, with_names(), ["bottleneck"], folder=tmp_path)
    assert counted == ["bottleneck"]


def test_a_damaged_file_is_named_and_measured_again(model, dataset, tmp_path, counted, caplog):
    evaluation.evaluate(model, dataset, ["bottleneck"], folder=tmp_path)
    file = tmp_path / "bottleneck.npz"
    whole = file.read_bytes()
    directory = whole.index(b"PK\1\2")  # the list of members; 10 bytes on it has the method of compression
    unknown = whole[: directory + 10] + b"\x63" + whole[directory + 11 :]
    for damaged in (whole[:100], b"", whole[:200] + bytes(100) + whole[300:], unknown):
        counted.clear()
        caplog.clear()
        file.write_bytes(damaged)
        results = evaluation.evaluate(model, dataset, ["bottleneck"], folder=tmp_path)
        assert counted == ["bottleneck"]
        assert "bottleneck.npz cannot be read" in caplog.text
        assert results["bottleneck"].images == 7
        assert file.read_bytes() == whole


class Numbers(suite.Suite):
    """Looks at some images only: the labels are their numbers."""

    name = "numbers"

    def __init__(self, subject, limit=None):
        super().__init__(subject)
        self.limit = limit

    def measure(self, batch):
        assert len(batch.fields["mark"]) == len(batch.labels)
        return {"label": batch.labels, "mark": batch.fields["mark"]}

    def summarise(self, values, resamples, seed):
        return suite.Summary({})


@pytest.mark.parametrize("count", [1, 2, 6, 7, 22, 23, 24])
def test_some_images_are_spread_evenly_over_the_data(fake_model, batched, count):
    dataset = batched(np.arange(23), 4, mark=10 * np.arange(23))
    seen = []
    found = suite.run(
        fake_model(logits=np.eye(23)),
        dataset,
        Numbers,
        {"limit": count},
        progress=lambda done, total: seen.append((done, total)),
    )
    expected = [k * 23 // count for k in range(count)] if count < 23 else list(range(23))
    assert found.per_image["label"].tolist() == expected
    assert (found.per_image["mark"] == 10 * found.per_image["label"]).all()
    assert found.images == len(expected)
    assert seen[-1] == (len(expected), count if count < 23 else 23)


def test_of_data_that_can_be_read_once_the_first_images_are_taken(fake_model, batched):
    dataset = batched(np.arange(23), 4, mark=np.arange(23))
    found = suite.run(fake_model(logits=np.eye(23)), iter(dataset), Numbers, {"limit": 6})
    assert found.per_image["label"].tolist() == [0, 1, 2, 3, 4, 5]
