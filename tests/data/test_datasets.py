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
    with pytest.raises(
        ValueError, match=f"{', '.join(sorted(data.DATASETS))}, and image_folder/FOLDER.*Received: name='mnist'"
    ):
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
        {"resize": (32, 31)},
        {"resize": (40,)},
        {"crop_to_box": True},
    ],
)
def test_an_entry_whose_numbers_do_not_fit_is_refused(change):
    (argument,) = change
    with pytest.raises(ValueError, match=f"`{argument}`.*Received: {argument}="):
        dataclasses.replace(data.get("cifar10"), **change)


def test_a_crop_to_boxes_needs_one_size_to_bring_them_to():
    with pytest.raises(ValueError, match=r"`crop_to_box` needs.*Received: crop_to_box=True, resize=None"):
        dataclasses.replace(data.get("caltech_birds2011"), resize=None)


def test_classes_have_their_published_names_in_the_order_of_the_labels():
    fine = data.get("cifar100").class_names
    assert fine == tuple(sorted(set(fine)))
    assert (fine[0], fine[26], fine[99]) == ("apple", "crab", "worm")
    birds = data.get("caltech_birds2011").class_names
    assert len(set(birds)) == 200
    numbered = {1: "Black_footed_Albatross", 53: "Western_Grebe", 103: "Sayornis", 134: "Cape_Glossy_Starling"}
    numbered |= {160: "Black_throated_Blue_Warbler", 183: "Northern_Waterthrush", 200: "Common_Yellowthroat"}
    assert {number: birds[number - 1] for number in numbered} == numbered
