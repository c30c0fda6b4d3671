"""Every number of concept discovery, with the values of the papers for large and for small images."""

from dataclasses import dataclass

from hf_prune.errors import DataError

Rules = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class ConceptSettings:
    """How concepts are found and ranked; the defaults are those for images of 128 pixels and more.

    Attributes:
        images_per_class: Images that are divided into segments, and over which TCAV scores are averaged.
        min_images: A class with fewer readable images is left out. Ours.
        segment_counts: Superpixels per image that SLIC is asked for, one number per resolution.
        compactness: Of SLIC, near shape against near colour.
        sigma: Of SLIC, smoothing before it in pixels.
        min_area: A segment is dropped if it is no larger than this share of the image.
        max_jaccard: A segment is dropped if it overlaps with one that is kept of the same image by more than this.
        fill: Grey level, 0 to 255, of what lies outside a segment.
        num_clusters: Of k-means.
        kmeans_starts: Of k-means, of which the best counts; what scikit-learn did when ACE was written.
        min_segments: A cluster is kept if it has more segments than this, and if a rule below agrees.
        keep_rules: Pairs (a, b): a cluster of n segments from m of the M images is kept if m > a n and m > b M.
        max_segments: Segments of a cluster that are kept, those nearest to its centre.
        num_random_sets: Sets of random images that a concept is told from, one direction each.
        random_set_size: Images in each.
        balance: Use no more of them than a concept has segments, as TCAV's and ACE's code does.
        cav_alpha: Regularisation of the linear classifier.
        holdout: Share of the examples on which its accuracy is measured.
        max_p_value: A concept counts as significant up to here; see `Concept.p_value`.
        unranked_segments: Random segments of each class that are kept beside its concepts. Ours.
        seed: Decides every random choice.

    Raises:
        DataError: If a number is out of range.

    Source: Ghorbani et al., Towards Automatic Concept-based Explanations, NeurIPS 2019 (ACE), and its code.
    """

    images_per_class: int = 40
    min_images: int = 10
    segment_counts: tuple[int, ...] = (15, 50, 80)
    compactness: float = 20.0
    sigma: float = 1.0
    min_area: float = 0.001
    max_jaccard: float = 0.5
    fill: int = 117
    num_clusters: int = 25
    kmeans_starts: int = 10
    min_segments: int = 40
    keep_rules: Rules = ((0.5, 0.0), (0.25, 0.25), (0.1, 0.5))
    max_segments: int = 40
    num_random_sets: int = 20
    random_set_size: int = 500
    balance: bool = True
    cav_alpha: float = 0.01
    holdout: float = 0.33
    max_p_value: float = 0.01
    unranked_segments: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = {
            "images_per_class": 2,
            "min_images": 2,
            "num_clusters": 1,
            "kmeans_starts": 1,
            "min_segments": 2,
            "max_segments": 3,
            "num_random_sets": 2,
            "random_set_size": 3,
            "unranked_segments": 0,
            "seed": 0,
        }
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise DataError(f"`{name}` of concept settings must be at least {least}, got {getattr(self, name)}")
        if not self.segment_counts or min(self.segment_counts) < 1:
            raise DataError(f"`segment_counts` must hold numbers of at least 1, got {self.segment_counts}")
        for name in ("min_area", "max_jaccard", "holdout", "max_p_value"):
            if not 0 <= getattr(self, name) <= 1 or (name == "holdout" and self.holdout in (0, 1)):
                raise DataError(f"`{name}` of concept settings must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.fill <= 255:
            raise DataError(f"`fill` must be a grey level of 0 to 255, got {self.fill}")

    @property
    def random_images_used(self) -> int:
        """Images of each random set that ever count."""
        return min(self.random_set_size, self.max_segments) if self.balance else self.random_set_size


IMAGENET = ConceptSettings()
"""For images of 128 pixels and more."""

SMALL_IMAGES = ConceptSettings(
    images_per_class=30, segment_counts=(5, 10, 15), min_segments=10, num_random_sets=10, max_p_value=0.2
)
"""For images of about 32 pixels, as in the CIFAR-10 script of Yang et al. (2024), `Nonac/DDOPaI`."""
