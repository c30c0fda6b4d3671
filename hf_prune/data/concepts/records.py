"""What is known of a class: its pictures, their segments, and the concepts that segments of several pictures share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_prune.data.concepts.segments import Picture, Segment, patch_of
from hf_prune.data.concepts.settings import ConceptSettings


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A cluster of segments that look alike to the teacher, and how much its class depends on it.

    Attributes:
        segments: Indices into the segments of the class, nearest to the centre of the cluster first.
        num_segments: Segments of the cluster, more perhaps than are kept.
        num_images: Pictures that these come from.
        scores: TCAV score for each random set: share of the pictures of the class whose logit grows when the
            features move towards the concept, 0 to 1.
        p_value: Of a paired t-test of the scores against those of a random set of images in the place of a concept.
        cav_accuracy: How well the concept is told from random images, on held-out examples, 0 to 1.
        sensitivity: Mean growth of the logit for a step of length one towards the concept.
    """

    segments: tuple[int, ...]
    num_segments: int
    num_images: int
    scores: tuple[float, ...]
    p_value: float
    cav_accuracy: float
    sensitivity: float

    @property
    def score(self) -> float:
        """The mean TCAV score."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassConcepts:
    """The concepts of a class.

    Attributes:
        label: Number of the class.
        pictures: `(n, H, W, 3)` in bytes, as the teacher sees them.
        segments: Those that concepts or `unranked` refer to.
        concepts: By score, best first; equal ones by sensitivity.
        unranked: Indices of segments drawn at random from all that were found.
        settings: What they were found with.
        num_found: Segments that were found in the pictures.
        num_unreadable: Images that could not be read while looking for pictures.
        problem: Why there are no concepts, or None.
    """

    label: int
    pictures: npt.NDArray[np.uint8]
    segments: tuple[Segment, ...]
    concepts: tuple[Concept, ...]
    unranked: tuple[int, ...]
    settings: ConceptSettings
    num_found: int
    num_unreadable: int
    problem: str | None

    def is_significant(self, concept: Concept) -> bool:
        """Return whether a concept differs from a random one; see `ConceptSettings.max_p_value`."""
        return concept.p_value <= self.settings.max_p_value

    def ranked(self, *, significant_only: bool = False, min_cav_accuracy: float = 0.0) -> tuple[Concept, ...]:
        """Return the concepts by score, best first.

        Args:
            significant_only: Leave out what does not differ from a random concept.
            min_cav_accuracy: Leave out what is told from random images less well.
        """
        found = [c for c in self.concepts if c.cav_accuracy >= min_cav_accuracy]
        return tuple(c for c in found if self.is_significant(c) or not significant_only)

    def patch(self, index: int) -> Picture:
        """Return a segment at its place in its picture, with grey around it."""
        segment = self.segments[index]
        return patch_of(self.pictures[segment.image], segment, self.settings.fill)


def in_turns(concepts: Sequence[Concept], number: int) -> list[int]:
    """Return up to `number` segments: the best one of each concept in turn, then the second one of each, and so on."""
    longest = max((len(concept.segments) for concept in concepts), default=0)
    turns = [c.segments[turn] for turn in range(longest) for c in concepts if turn < len(c.segments)]
    return turns[:number]
