"""Segments that look alike to the teacher, in enough pictures to be more than one picture's background."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans

from hf_prune.data.concepts.settings import ConceptSettings


@dataclass(frozen=True)
class Cluster:
    """A group of segments.

    Attributes:
        members: Which ones, nearest to the centre first, `max_segments` at most.
        num_segments: How many there are in all.
        num_images: How many pictures they come from.
    """

    members: tuple[int, ...]
    num_segments: int
    num_images: int


def find_clusters(
    features: npt.NDArray[np.float32],
    image_of: npt.NDArray[np.intp],
    num_images: int,
    settings: ConceptSettings,
    seed: int,
) -> list[Cluster]:
    """Group segments by k-means and keep the clusters that are frequent enough.

    Args:
        features: Segments x features.
        image_of: Picture of each segment.
        num_images: Pictures in all.
        settings: `num_clusters`, `kmeans_starts`, `min_segments`, `keep_rules`, `max_segments`.
        seed: Decides where k-means starts.

    Returns:
        None to `num_clusters` clusters, in no order that means anything.
    """
    # Empty corners of many images are the same picture: there may be fewer different ones than clusters.
    num_clusters = min(settings.num_clusters, len(np.unique(features, axis=0)))
    means = cast(Any, KMeans)(num_clusters, n_init=settings.kmeans_starts, random_state=seed).fit(features)
    clusters = []
    for number, centre in enumerate(means.cluster_centers_):
        members = np.flatnonzero(means.labels_ == number)
        seen = len(np.unique(image_of[members]))
        common = any(seen > a * len(members) and seen > b * num_images for a, b in settings.keep_rules)
        if len(members) > settings.min_segments and common:
            distances = np.linalg.norm(features[members] - centre, axis=1)
            nearest = members[np.argsort(distances, kind="stable")[: settings.max_segments]]
            clusters.append(Cluster(tuple(nearest.tolist()), len(members), seen))
    return clusters
