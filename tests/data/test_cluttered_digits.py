import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from aib_tf import data
from aib_tf.data import cluttered_digits

TINY = "cluttered_digits/train60_validation20_test20_seed3"


@pytest.fixture(scope="module")
def digits():
    return cluttered_digits.source_digits()[0]


@pytest.fixture(scope="module")
def drawing(digits):
    return cluttered_digits.draw(digits, 200, 7)


@pytest.fixture(scope="module")
def examples(data_dir):
    return {
        split: tfds.as_numpy(tfds.load(TINY, split=split, data_dir=data_dir, batch_size=-1))
        for split in cluttered_digits.SPLITS
    }


def test_the_source_is_real_digits_of_every_class():
    digits, labels = cluttered_digits.source_digits()
    assert digits.shape == (1797, 16, 16) and digits.dtype == np.uint8
    assert digits.min() == 0 and digits.max() == 255
    assert np.bincount(labels).min() > 170


def test_every_source_digit_is_in_one_split_and_classes_are_shared_out_evenly():
    _, labels = cluttered_digits.source_digits()
    splits = cluttered_digits.split_sources(labels)
    everything = np.concatenate(list(splits.values()))
    np.testing.assert_array_equal(np.sort(everything), np.arange(1797))
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        counts = np.bincount(labels[splits[split]])
        np.testing.assert_allclose(counts / np.bincount(labels), share, atol=0.01)


def test_neither_digit_nor_clutter_crosses_a_split(examples):
    _, labels = cluttered_digits.source_digits()
    used = {
        split: {*example["id"].tolist(), *example["fragment_ids"].ravel().tolist()}
        for split, example in examples.items()
    }
    allowed = cluttered_digits.split_sources(labels)
    for split in cluttered_digits.SPLITS:
        assert used[split] <= set(allowed[split].tolist())
    for example in examples.values():
        np.testing.assert_array_equal(example["label"], labels[example["id"]])


def test_the_digit_stands_untouched_in_its_box(drawing, digits):
    for image, mask, box, source in zip(drawing.images, drawing.masks, drawing.boxes, drawing.sources, strict=True):
        top, left, bottom, right = box
        ink = digits[source] >= cluttered_digits.INK_THRESHOLD
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        inner = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        np.testing.assert_array_equal(image[top:bottom, left:right, 0], digits[source][inner])
        np.testing.assert_array_equal(mask[top:bottom, left:right, 0], ink[inner])


def test_the_box_is_tight_around_the_mask(drawing):
    for mask, (top, left, bottom, right) in zip(drawing.masks, drawing.boxes, strict=True):
        rows, columns, _ = np.nonzero(mask)
        assert (rows.min(), columns.min()) == (top, left)
        assert (rows.max() + 1, columns.max() + 1) == (bottom, right)
    assert set(np.unique(drawing.masks)) == {0, 1}


def test_there_is_clutter_of_other_digits_around_every_digit(drawing):
    assert (drawing.fragment_sources != drawing.sources[:, np.newaxis]).all()
    for image, (top, left, bottom, right) in zip(drawing.images, drawing.boxes, strict=True):
        outside = image.copy()
        outside[top:bottom, left:right] = 0
        ink = outside >= cluttered_digits.INK_THRESHOLD
        assert ink.sum() >= 2 * cluttered_digits.FRAGMENT_INK


def test_digits_and_clutter_reach_every_part_of_the_canvas(digits):
    drawing = cluttered_digits.draw(digits, 2000, 0)
    assert (drawing.images.max(axis=0) > 200).all()
    # Uniform places: the middle of the box is on average in the middle of the canvas.
    middles = (drawing.boxes[:, :2] + drawing.boxes[:, 2:]) / 2
    np.testing.assert_allclose(middles.mean(axis=0), 16, atol=0.5)


def test_an_image_depends_on_the_seed_but_not_on_how_many_are_drawn(drawing, digits):
    few = cluttered_digits.draw(digits, 5, 7)
    np.testing.assert_array_equal(few.images, drawing.images[:5])
    np.testing.assert_array_equal(few.boxes, drawing.boxes[:5])
    other = cluttered_digits.draw(digits, 5, 8)
    assert (other.images != few.images).any(axis=(1, 2, 3)).all()


def test_the_drawing_is_the_same_on_every_machine(digits):
    drawing = cluttered_digits.draw(digits, 3, (0, 0))
    # From the first release: a change here needs another VERSION of the data set.
    assert drawing.sources.tolist() == [1144, 759, 1678]
    assert drawing.boxes.tolist() == [[4, 2, 20, 13], [0, 5, 16, 15], [6, 12, 22, 22]]
    assert drawing.images.sum(axis=(1, 2, 3)).tolist() == [44067, 49235, 49882]


def test_a_drawing_without_other_digits_or_without_ink_is_refused(digits):
    with pytest.raises(ValueError, match=r"Received: len\(digits\)=1"):
        cluttered_digits.draw(digits[:1], 1, 0)
    with pytest.raises(ValueError, match="no ink"):
        cluttered_digits.draw(np.stack([digits[0], np.zeros_like(digits[0])]), 50, 0)


def test_the_files_hold_what_was_drawn(examples, digits):
    _, labels = cluttered_digits.source_digits()
    for number, split in enumerate(cluttered_digits.SPLITS):
        sources = cluttered_digits.split_sources(labels)[split]
        example = examples[split]
        drawn = cluttered_digits.draw(digits[sources], len(example["label"]), (3, number))
        np.testing.assert_array_equal(example["image"], drawn.images)
        np.testing.assert_array_equal(example["mask"], drawn.masks)
        np.testing.assert_array_equal(example["bbox"] * 32, drawn.boxes)
        np.testing.assert_array_equal(example["id"], sources[drawn.sources])
        np.testing.assert_array_equal(example["fragment_ids"], sources[drawn.fragment_sources])


def test_a_configuration_has_sizes_and_seed_in_its_name():
    config = cluttered_digits.ClutteredDigitsConfig(train=6, validation=2, test=3, seed=4)
    assert config.name == "train6_validation2_test3_seed4"
    again = cluttered_digits.ClutteredDigitsConfig.from_name(config.name)
    assert (again.train, again.validation, again.test, again.seed) == (6, 2, 3, 4)
    (default,) = cluttered_digits.ClutteredDigits.BUILDER_CONFIGS
    assert default.name == "train12000_validation2000_test2000_seed0"


@pytest.mark.parametrize(
    "arguments",
    [
        {"train": 0},
        {"validation": -1},
        {"test": 1.5},
        {"test": True},
        {"seed": -1},
        {"seed": 2**32},
        {"name": "other"},
    ],
)
def test_an_impossible_configuration_is_refused(arguments):
    (argument,) = arguments
    with pytest.raises(ValueError, match=f"Received: {argument}="):
        cluttered_digits.ClutteredDigitsConfig(**arguments)


@pytest.mark.parametrize("name", ["large", "train0_validation1_test1_seed0", "train1_test1_seed0"])
def test_a_name_that_is_no_configuration_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="Received: "):
        data.load(f"cluttered_digits/{name}", "train", 8, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tfds_takes_a_configuration_object(tmp_path):
    config = cluttered_digits.ClutteredDigitsConfig(train=5, validation=1, test=1)
    examples = tfds.load("cluttered_digits", split="train", data_dir=tmp_path, builder_kwargs={"config": config})
    assert len(examples) == 5


def test_two_processes_may_prepare_the_same_data_at_once(tmp_path):
    program = (
        "import sys\n"
        "from aib_tf import data\n"
        "name = 'cluttered_digits/train400_validation1_test1_seed0'\n"
        "print(data.num_examples(name, 'train', sys.argv[1]))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "new")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.split()[-1] == "400"
