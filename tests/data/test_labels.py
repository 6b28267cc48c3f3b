"""The data's labels as the checkpoint's classes."""

from __future__ import annotations

import pytest

from vitprune.data.labels import Classes, match, spelling

IMAGENET = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "crane", 3: "T-shirt/top", 4: "crane"}


def ids(names: list[str], theirs: dict[int, str], given: dict[str, str | int] | None = None) -> list[int]:
    labels = match(names, Classes(theirs, given or {}), "label", "here")
    return [labels.id_of(index) for index in range(len(names))]


@pytest.mark.parametrize(
    ("one", "other"), [("t_shirt", "T-Shirt"), ("great  white", "great_white"), (" tench ", "Tench")]
)
def test_spellings(one: str, other: str) -> None:
    assert spelling(one) == spelling(other)


def test_names_may_differ_in_spelling_and_be_one_of_a_list() -> None:
    assert ids(["Goldfish", "tinca_tinca", "t shirt/TOP"], IMAGENET) == [1, 0, 3]
    labels = match(["Goldfish", "t shirt/TOP"], Classes(IMAGENET), "label", "here")
    assert labels.notes == (
        "The data has 2 of the checkpoint's 5 classes.",
        "Class names that are spelled otherwise were matched: 'Goldfish' for 'goldfish, Carassius auratus', "
        "'t shirt/TOP' for 'T-shirt/top'.",
    )


def test_equal_names_are_refused_unless_all_stand_in_their_order() -> None:
    with pytest.raises(ValueError, match=r"here: 'crane' is the name of several .*\(ids 2, 4\); .*\{crane: 2\}"):
        ids(["crane"], IMAGENET)
    assert ids(["crane"], IMAGENET, {"crane": 4}) == [4]
    assert ids(list(IMAGENET.values()), IMAGENET) == [0, 1, 2, 3, 4]


def test_two_names_for_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'tench' and 'Tinca tinca' are both the checkpoint's 'tench, Tinca tinca'"):
        ids(["tench", "Tinca tinca"], IMAGENET)


def test_folders_named_by_number_count_as_numbers() -> None:
    # as folders come: in the order of their names
    assert ids(["0", "1", "10", "2"], {i: f"class {i}x" for i in range(12)}) == [0, 1, 10, 2]
    assert ids(["7", "3"], {0: "3", 1: "7"}) == [1, 0]
    with pytest.raises(ValueError, match="1 of the data's 1 classes are not among"):
        ids(["12"], {0: "a"})


def test_wordnet_ids_are_known_by_their_order() -> None:
    names = ["n01443537", "n01440764", "n02012849"]
    theirs = {0: "tench", 1: "goldfish", 2: "crane"}
    labels = match(names, Classes(theirs), "label", "here")
    assert [labels.id_of(index) for index in range(3)] == [1, 0, 2]
    assert "WordNet ids" in labels.notes[0]
    with pytest.raises(ValueError, match="WordNet ids are known by their order where all classes are there"):
        ids(names[:2], theirs)


def test_a_recipe_says_what_is_meant() -> None:
    assert ids(["fish", "bird"], IMAGENET, {"fish": "tench", "bird": 2}) == [0, 2]
    with pytest.raises(ValueError, match="label_names: 'fish' is given the id 9, which the checkpoint hasn't"):
        ids(["fish"], IMAGENET, {"fish": 9})
    with pytest.raises(ValueError, match=r"label_names: 'fish' is given the name 'goldfsh', which is not among the"):
        ids(["fish"], IMAGENET, {"fish": "goldfsh"})


def test_values_beyond_the_datas_classes_are_refused() -> None:
    labels = match(["goldfish", "crane bird"], Classes({0: "crane bird", 1: "goldfish"}), "label", "here")
    for value in (-1, 2, "goldfish", None):
        with pytest.raises(ValueError, match="is not a class id, the checkpoint has labels 0 to 1"):
            labels.id_of(value)
