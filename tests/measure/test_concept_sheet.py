"""The contact sheet shows the concepts that it says it shows."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from planted_concepts import QUICK, planted_rows, quick_concepts, splits_of_pictures

from hf_prune.errors import DataError
from hf_prune.measure.concept_sheet import plot_concept_sheet
from hf_prune.measure.figures import MAX_BYTES


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    return quick_concepts(tmp_path_factory.mktemp("concepts"))


def pixels_of(path):
    assert path.stat().st_size <= MAX_BYTES
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def grey_share(path):
    """Share of the sheet that is as grey as what surrounds a segment."""
    return float((np.abs(pixels_of(path) - 117).max(-1) <= 2).mean())


def test_classes_have_rows_and_concepts_columns(concepts, tmp_path):
    plot_concept_sheet(concepts, tmp_path / "three.png", labels=[3, 1, 0], num_concepts=2, num_patches=2)
    plot_concept_sheet(concepts, tmp_path / "one.png", labels=[3])
    three, one = (pixels_of(tmp_path / f"{name}.png").shape for name in ("three", "one"))
    assert three[0] > 1.8 * one[0]
    assert one[1] > 1.5 * three[1]
    assert grey_share(tmp_path / "three.png") > 0.15


def test_titles_tell_scores_and_doubts(concepts, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.set_title", lambda self, text, **style: titles.append((text, style["color"]))
    )
    plot_concept_sheet(concepts, tmp_path / "sheet.png", labels=[2], num_concepts=3)
    here = concepts.read(2)
    expected = [
        f"TCAV {c.score:.2f}" + ("" if here.is_significant(c) else f" (p {c.p_value:.2f})") for c in here.concepts[:3]
    ]
    assert [text for text, _ in titles] == expected


def test_patches_are_those_nearest_to_the_centre(concepts, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, picture, **_: shown.append(picture))
    plot_concept_sheet(concepts, tmp_path / "sheet.png", labels=[1], num_concepts=1, num_patches=2)
    here = concepts.read(1)
    first, second = here.concepts[0].segments[:2]
    (tile,) = shown
    np.testing.assert_array_equal(tile[:32, :32], here.patch(first))
    np.testing.assert_array_equal(tile[:32, -32:], here.patch(second))
    # Below: the segment as it is, and the rest of the picture paler.
    segment, below = here.segments[first], tile[-32:, :32].astype(int)
    picture = here.pictures[segment.image].astype(int)
    inside = np.zeros((32, 32), bool)
    segment.box_of(inside)[segment.mask] = True
    np.testing.assert_array_equal(below[inside], picture[inside])
    assert (below[~inside] > picture[~inside] - 30).all()
    assert np.ptp(below[~inside]) < 0.6 * 255


def test_a_class_without_concepts_has_the_reason(tmp_path, monkeypatch):
    pictures, _, labels = planted_rows(12)
    keep = (labels != 1) | (np.cumsum(labels == 1) <= 4)
    found = quick_concepts(tmp_path, QUICK, splits=splits_of_pictures(pictures[keep], labels[keep]), labels=[0, 1])
    texts = []
    write = "matplotlib.axes.Axes.text"
    monkeypatch.setattr(write, lambda self, x, y, text, **_: texts.append(text))
    plot_concept_sheet(found, tmp_path / "sheet.png")
    assert texts == ["class 0", "class 1", "4 readable images, fewer than 5"]
    assert (tmp_path / "sheet.png").exists()


def test_nothing_to_show(tmp_path, concepts):
    empty = quick_concepts(tmp_path, replace(QUICK, min_images=10), labels=[])
    with pytest.raises(DataError, match="at least one class, concept and patch, got 0 classes"):
        plot_concept_sheet(empty, tmp_path / "never.png")
    with pytest.raises(DataError, match="0 concepts"):
        plot_concept_sheet(concepts, tmp_path / "never.png", num_concepts=0)
    with pytest.raises(DataError, match="class 9 must be in"):
        plot_concept_sheet(concepts, tmp_path / "never.png", labels=[9])
    assert not (tmp_path / "never.png").exists()
