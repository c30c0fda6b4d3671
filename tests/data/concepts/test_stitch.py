"""Stitched canvases are covered as asked, by whole segments that hardly hide each other."""

from dataclasses import replace

import numpy as np
import pytest
from planted_concepts import QUICK

from hf_prune.data.concepts.records import ClassConcepts, Concept
from hf_prune.data.concepts.segments import Segment
from hf_prune.data.concepts.stitch import StitchSettings, stitch
from hf_prune.errors import DataError

PLAIN = StitchSettings(flip_prob=0.0)
GREY = (120, 121, 122)


def stitched(found, settings=PLAIN, seed=0, label=0):
    here = found.read(label)
    return here, stitch(here, here.concepts, settings, GREY, np.random.default_rng(seed))


def concept_of(segments, score):
    return Concept(
        segments=tuple(segments),
        num_segments=len(segments),
        num_images=1,
        scores=(score,),
        p_value=0.0,
        cav_accuracy=1.0,
        sensitivity=0.0,
    )


def made_up(masks, groups, scores):
    """A class of one coloured picture with segments of given shapes, in concepts."""
    picture = np.random.default_rng(0).integers(0, 256, (1, 24, 20, 3), dtype=np.uint8)
    return ClassConcepts(
        label=0,
        pictures=picture,
        segments=tuple(Segment(0, 0, 0, mask) for mask in masks),
        concepts=tuple(concept_of(group, score) for group, score in zip(groups, scores, strict=True)),
        unranked=(),
        settings=QUICK,
        num_found=len(masks),
        num_unreadable=0,
        problem=None,
    )


@pytest.mark.parametrize("seed", range(5))
def test_covered_is_where_segments_lie_and_the_rest_is_ground(found_once, seed):
    here, canvas = stitched(found_once, seed=seed)
    covered = np.zeros((32, 32), bool)
    for pasted in canvas.pasted:
        height, width = pasted.mask.shape
        under = covered[pasted.top : pasted.top + height, pasted.left : pasted.left + width]
        assert under.shape == pasted.mask.shape  # inside the canvas
        assert pasted.overlap == pytest.approx(under[pasted.mask].mean())
        assert pasted.overlap <= 0.25
        under |= pasted.mask
    np.testing.assert_array_equal(canvas.covered, covered)
    assert (canvas.picture[~covered] == GREY).all()
    # The last one lies above all others.
    last = canvas.pasted[-1]
    segment = here.segments[last.segment]
    if last.mask.shape == segment.mask.shape:
        box = canvas.picture[last.top : last.top + last.mask.shape[0], last.left : last.left + last.mask.shape[1]]
        original = segment.box_of(here.pictures[segment.image])
        np.testing.assert_array_equal(box[last.mask], original[segment.mask])


@pytest.mark.parametrize("coverage", [0.2, 0.5, 0.8])
def test_segments_are_added_until_enough_is_covered(found_once, coverage):
    for seed in range(5):
        _, canvas = stitched(found_once, replace(PLAIN, coverage=coverage, max_segments=1000), seed)
        assert canvas.covered.mean() >= coverage
        # Without the last one it was not enough.
        last = canvas.pasted[-1]
        assert canvas.covered.mean() - (1 - last.overlap) * last.mask.sum() / 1024 < coverage
        segments = [pasted.segment for pasted in canvas.pasted]
        assert len(set(segments)) == len(segments)


def test_no_more_segments_than_allowed(found_once):
    _, canvas = stitched(found_once, replace(PLAIN, coverage=1.0, max_segments=3))
    assert len(canvas.pasted) == 3
    _, canvas = stitched(found_once, replace(PLAIN, coverage=0.0))
    assert canvas.pasted == ()
    assert (canvas.picture == GREY).all()


def test_the_first_segment_has_its_own_size_and_later_ones_shrink_to_fit():
    whole = np.ones((20, 16), bool)
    found = made_up([whole, whole], [[0], [1]], [1.0, 0.9])
    canvas = stitch(found, found.concepts, replace(PLAIN, coverage=1.0), GREY, np.random.default_rng(0))
    first, second = canvas.pasted
    assert first.mask.shape == (20, 16)
    # 0.8 of a side, rounded down, until it fits beside the first with a quarter above it.
    sides = [(20, 16), (16, 12), (12, 9), (9, 7), (7, 5), (5, 4), (4, 3), (3, 2), (2, 1)]
    assert second.mask.shape in sides[1:]
    assert second.overlap <= 0.25
    no_overlap = replace(PLAIN, coverage=1.0, max_overlap=0.0)
    canvas = stitch(found, found.concepts, no_overlap, GREY, np.random.default_rng(0))
    assert [pasted.overlap for pasted in canvas.pasted] == [0.0] * len(canvas.pasted)


def test_every_segment_goes_where_most_is_free():
    found = made_up([np.ones((12, 20), bool), np.ones((12, 20), bool)], [[0], [1]], [1.0, 1.0])
    for seed in range(5):
        canvas = stitch(found, found.concepts[:1], PLAIN, GREY, np.random.default_rng(seed))
        assert canvas.covered.sum() == 240
    tops = set()
    small = made_up([np.ones((4, 4), bool)] * 8, [range(8)], [1.0])
    for seed in range(20):
        canvas = stitch(small, small.concepts, replace(PLAIN, coverage=1.0), GREY, np.random.default_rng(seed))
        # There is free room for all eight, so that none overlaps.
        assert sum(pasted.overlap for pasted in canvas.pasted) == 0
        assert canvas.covered.sum() == 8 * 16
        tops.add(canvas.pasted[0].top)
    assert len(tops) > 8


def test_concepts_take_turns_or_go_by_score():
    found = made_up([np.ones((2, 2), bool)] * 60, [range(20), range(20, 40), range(40, 60)], [0.9, 0.1, 0.0])
    drawn = {}
    for draw in ("in_turn", "by_score"):
        settings = replace(PLAIN, draw=draw, coverage=1.0, max_segments=9)
        canvases = [stitch(found, found.concepts, settings, GREY, np.random.default_rng(seed)) for seed in range(20)]
        drawn[draw] = [[pasted.segment // 20 for pasted in canvas.pasted] for canvas in canvases]
    assert drawn["in_turn"] == [[0, 1, 2] * 3] * 20
    shares = np.bincount(np.ravel(drawn["by_score"]), minlength=3) / 180
    assert shares[0] > 0.8
    assert 0 < shares[1] < 0.2
    assert shares[2] == 0


def test_scores_that_are_all_zero_say_nothing():
    found = made_up([np.ones((2, 2), bool)] * 20, [range(10), range(10, 20)], [0.0, 0.0])
    settings = replace(PLAIN, draw="by_score", coverage=1.0, max_segments=20)
    canvas = stitch(found, found.concepts, settings, GREY, np.random.default_rng(0))
    assert sorted(pasted.segment for pasted in canvas.pasted) == list(range(20))


def test_canvases_are_mirrored_and_follow_their_seed(found_once):
    _, plain = stitched(found_once)
    _, mirrored = stitched(found_once, replace(PLAIN, flip_prob=1.0))
    np.testing.assert_array_equal(plain.picture, mirrored.picture[:, ::-1])
    np.testing.assert_array_equal(plain.covered, mirrored.covered[:, ::-1])
    np.testing.assert_array_equal(plain.picture, stitched(found_once)[1].picture)
    assert not np.array_equal(plain.picture, stitched(found_once, seed=1)[1].picture)


@pytest.mark.parametrize(
    "wrong",
    [{"coverage": 1.5}, {"max_overlap": -0.1}, {"shrink": 1.0}, {"max_segments": 0}, {"draw": "any"}, {"flip_prob": 2}],
)
def test_settings_are_checked(wrong):
    with pytest.raises(DataError, match=str(next(iter(wrong)))):
        StitchSettings(**wrong)
