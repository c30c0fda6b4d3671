"""Concepts of every class of a dataset, once: found by a teacher, ranked, and kept on disk."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn
from tqdm.auto import tqdm

from hf_prune.data.concepts.cache import ConceptCache, Header
from hf_prune.data.concepts.cluster import find_clusters
from hf_prune.data.concepts.pictures import Pictures
from hf_prune.data.concepts.rank import concept_vectors, p_value, tcav_scores
from hf_prune.data.concepts.records import ClassConcepts, Concept
from hf_prune.data.concepts.segments import Segment, resized_of, superpixels
from hf_prune.data.concepts.settings import IMAGENET, ConceptSettings
from hf_prune.data.concepts.teacher import Teacher
from hf_prune.data.images import ImageSplits
from hf_prune.data.transforms import Preprocessing
from hf_prune.errors import DataError

Features = npt.NDArray[np.float32]

# What a seed is for; every choice has a stream of its own, so that classes do not depend on each other.
CLASS_PICTURES, RANDOM_PICTURES, CLUSTERS, VECTORS, RANDOM_VECTORS, UNRANKED = range(6)


def discover_concepts(
    model: nn.Module,
    splits: ImageSplits,
    folder: str | Path,
    *,
    preprocessing: Preprocessing,
    layer: str | None = None,
    settings: ConceptSettings = IMAGENET,
    labels: Iterable[int] | None = None,
    batch_size: int = 64,
) -> ConceptCache:
    """Find and rank the concepts of the classes of a dataset, and keep them in a folder.

    Per class: superpixels of `images_per_class` training images at several resolutions; features of their stretched
    cut-outs at a layer of the teacher; k-means, of which frequent clusters are kept; for each cluster a direction that
    tells it from random images (CAV), the share of images whose class logit grows along it (TCAV score), and a paired
    t-test against a random set in the place of a concept. Concepts are ranked by the score. Classes with too few
    readable images or without such a cluster get no concepts, and `ConceptCache.without_concepts` says why.

    A class that is in the folder is not done again, so that a run can be stopped, and several processes can share the
    work by `labels`. Memory: the pictures and segments of one class.

    Cost per class, measured on one processor core: 20 seconds for 40 images of 128 pixels and a MobileNet of a quarter
    of the usual width, nearly half of them the teacher's (4,500 segments, each seen once), the others superpixels,
    k-means and linear classifiers; 2 to 3 seconds for 30 images of 32 pixels and a ResNet-20. Once for a dataset, 840
    random images are looked at (440 with the settings for small images).

    Args:
        model: Teacher, trained on these classes. It must be named wherever concepts are used: it has seen labels.
        splits: The training split is read.
        folder: Where `ConceptCache` keeps them; made, or gone on with.
        preprocessing: What the teacher's input looks like.
        layer: Name of the layer in whose features concepts are looked for; found if None, see `find_bottleneck`.
        settings: `IMAGENET`, `SMALL_IMAGES` or other numbers.
        labels: Classes to do; all if None.
        batch_size: Pictures that the teacher sees at once.

    Raises:
        DataError: If the folder was made with other settings, another teacher or other data, or holds broken files; if
            the training split is a stream or smaller than a random set must be; if the teacher has other classes.
        UnsupportedModelError: If the teacher has no such layer.

    Source: Ghorbani et al., ACE, NeurIPS 2019; Kim et al., TCAV, ICML 2018; as used by Yang et al., One-cut Network
    Pruning at Initialization with Explainable Image Concepts, PRMU 2022, and its successors. Ours: features and
    directions are those of means over positions, equal scores are ordered by `Concept.sensitivity`, scores are averaged
    over the images that were divided into segments, and segments that the code of ACE loses (the last label, the last
    row and column of each cut-out) are not lost.
    """
    teacher = Teacher(model, preprocessing, layer=layer, batch_size=batch_size)
    pictures = Pictures(splits, preprocessing)
    wanted = sorted(set(range(splits.num_labels) if labels is None else labels))
    if teacher.num_classes != splits.num_labels or not set(wanted) <= set(range(splits.num_labels)):
        raise DataError(
            f"the teacher must be trained on the {splits.num_labels} classes of '{splits.source}' and `labels` be some "
            f"of them, got a teacher of {teacher.num_classes} classes and labels {wanted[:3]} ... {wanted[-1:]}"
        )
    cache = ConceptCache.at(folder, Header.of(teacher, pictures, settings, splits.source))
    missing = [label for label in wanted if not cache.has(label)]
    if not missing:
        return cache
    finder = _Finder(teacher, _random_features(teacher, pictures, cache), settings)
    for label in tqdm(missing, desc="concepts", unit="class"):
        key = (settings.seed, CLASS_PICTURES, label)
        cache.write(finder.find(label, *pictures.of_class(label, settings.images_per_class, key)))
    return cache


def _random_features(teacher: Teacher, pictures: Pictures, cache: ConceptCache) -> Features:
    """Return features of random images of all classes, one set more than concepts are told from."""
    features, settings = cache.random_features(), cache.header.settings
    if features is not None:
        return features
    sets = []
    for number in range(settings.num_random_sets + 1):
        key = (settings.seed, RANDOM_PICTURES, number)
        sets.append(teacher.features(pictures.of_any_class(settings.random_images_used, key)))
    if len(sets[0]) < 3:
        raise DataError(
            f"a random set must hold at least 3 readable images, got {len(sets[0])} from the training split"
        )
    cache.write_random_features(np.stack(sets))
    return np.stack(sets)


class _Finder:
    """Finds the concepts of one class after the other, with the same teacher and random images."""

    def __init__(self, teacher: Teacher, random_features: Features, settings: ConceptSettings) -> None:
        self.teacher, self.settings = teacher, settings
        self.random_sets = random_features[:-1]
        # The last set stands in the place of a concept.
        self.random_vectors, _ = self._vectors(random_features[-1], RANDOM_VECTORS)

    def find(self, label: int, pictures: npt.NDArray[np.uint8], num_unreadable: int) -> ClassConcepts:
        """Return the concepts of a class with the segments that they consist of, and some others."""
        settings = self.settings
        segments = [s for index, picture in enumerate(pictures) for s in superpixels(picture, index, settings)]
        concepts, unranked, problem = [], [], None
        if len(pictures) < settings.min_images:
            problem = f"{len(pictures)} readable images, fewer than {settings.min_images}"
        else:
            concepts = self._concepts(label, pictures, segments)
            rng = np.random.default_rng((settings.seed, UNRANKED, label))
            unranked = rng.permutation(len(segments))[: settings.unranked_segments].tolist()
            if not concepts:
                problem = f"no cluster of the {len(segments)} segments of {len(pictures)} images is frequent enough"
        used = sorted({*unranked, *(index for concept in concepts for index in concept.segments)})
        place = {index: number for number, index in enumerate(used)}
        return ClassConcepts(
            label=label,
            pictures=pictures,
            segments=tuple(segments[index] for index in used),
            concepts=tuple(replace(c, segments=tuple(place[index] for index in c.segments)) for c in concepts),
            unranked=tuple(place[index] for index in unranked),
            settings=settings,
            num_found=len(segments),
            num_unreadable=num_unreadable,
            problem=problem,
        )

    def _concepts(self, label: int, pictures: npt.NDArray[np.uint8], segments: Sequence[Segment]) -> list[Concept]:
        """Return the concepts by rank; their segments are indices into `segments`."""
        cut_outs = (resized_of(pictures[s.image], s, self.settings.fill) for s in segments)
        features = self.teacher.features(cut_outs)
        image_of = np.array([segment.image for segment in segments])
        seed = int(np.random.SeedSequence((self.settings.seed, CLUSTERS, label)).generate_state(1)[0])
        clusters = find_clusters(features, image_of, len(pictures), self.settings, seed)
        gradients = self.teacher.gradients(pictures, label)
        random_scores, _ = tcav_scores(gradients, self.random_vectors)
        concepts = []
        for number, cluster in enumerate(clusters):
            vectors, accuracy = self._vectors(features[list(cluster.members)], VECTORS, label, number)
            scores, sensitivity = tcav_scores(gradients, vectors)
            concepts.append(
                Concept(
                    segments=cluster.members,
                    num_segments=cluster.num_segments,
                    num_images=cluster.num_images,
                    scores=scores,
                    p_value=p_value(scores, random_scores),
                    cav_accuracy=accuracy,
                    sensitivity=sensitivity,
                )
            )
        return sorted(concepts, key=lambda concept: (-concept.score, -concept.sensitivity))

    def _vectors(self, examples: Features, *key: int) -> tuple[npt.NDArray[np.floating], float]:
        return concept_vectors(examples, self.random_sets, self.settings, (self.settings.seed, *key))
