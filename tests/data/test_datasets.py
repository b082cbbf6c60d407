import dataclasses

import pytest

from aib_tf import data


@pytest.mark.parametrize("name", sorted(data.DATASETS))
def test_every_entry_is_found_by_its_name(name):
    info = data.get(name)
    assert info.name == name
    assert set(info.splits) == {"train", "validation", "test"}
    assert {"image", "label"} <= set(info.fields)
    assert info.has_boxes == ("bbox" in info.fields)


def test_an_unknown_name_gets_the_list_of_names():
    with pytest.raises(ValueError, match=r"cifar10, cluttered_digits.*Received: name='mnist'"):
        data.get("mnist")


def test_only_a_generated_set_takes_a_configuration():
    name = "cluttered_digits/train6_validation1_test1_seed3"
    assert data.get(name).builder == name
    with pytest.raises(ValueError, match="Received: name='cifar10/large'"):
        data.get("cifar10/large")


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 1},
        {"crop_padding": 32},
        {"mean": (0.5,)},
        {"stddev": (0.5,)},
        {"class_names": ("cat",)},
    ],
)
def test_an_entry_whose_numbers_do_not_fit_is_refused(change):
    (argument,) = change
    with pytest.raises(ValueError, match=f"`{argument}`.*Received: {argument}="):
        dataclasses.replace(data.get("cifar10"), **change)
