"""Directions of concepts in the space of features, and how far a class depends on them: CAV and TCAV."""

import numpy as np
import numpy.typing as npt
from scipy.stats import ttest_rel
from sklearn.linear_model import SGDClassifier

from hf_prune.data.concepts.settings import ConceptSettings

EQUAL = 1e-9

Floats = npt.NDArray[np.floating]


def concept_vectors(
    examples: Floats, random_sets: Floats, settings: ConceptSettings, key: tuple[int, ...]
) -> tuple[Floats, float]:
    """Tell examples of a concept from each random set by a linear classifier.

    Args:
        examples: Examples x features.
        random_sets: Sets x images x features.
        settings: `balance`, `cav_alpha`, `holdout`.
        key: Decides which examples are held out, and the order of the steps.

    Returns:
        Sets x features, directions of length one that point to the concept (CAVs), and the mean accuracy on the
        examples that were held out.

    Source: Kim et al., Interpretability Beyond Feature Attribution (TCAV), ICML 2018.
    """
    vectors, accuracies = [], []
    seeds = np.random.SeedSequence(key).generate_state(len(random_sets))
    for others, seed in zip(random_sets, seeds.tolist(), strict=True):
        number = min(len(examples), len(others)) if settings.balance else None
        rng = np.random.default_rng(seed)
        held, train, held_labels, train_labels = [], [], [], []
        for label, points in enumerate((others[:number], examples[:number])):
            mixed, num_held = rng.permutation(points), max(1, round(settings.holdout * len(points)))
            held.append(mixed[:num_held])
            train.append(mixed[num_held:])
            held_labels += [label] * num_held
            train_labels += [label] * (len(points) - num_held)
        linear = SGDClassifier(loss="hinge", alpha=settings.cav_alpha, random_state=seed)
        linear.fit(np.concatenate(train), train_labels)
        # By hand, because `linear.score` takes longer to check its arguments than the fit takes.
        direction, offset = np.asarray(linear.coef_)[0], np.asarray(linear.intercept_)[0]
        accuracies.append(np.mean((np.concatenate(held) @ direction + offset > 0) == np.array(held_labels)))
        vectors.append(direction / (np.linalg.norm(direction) or 1.0))
    return np.stack(vectors), float(np.mean(accuracies))


def tcav_scores(gradients: Floats, vectors: Floats) -> tuple[tuple[float, ...], float]:
    """Return the share of images whose logit grows along each direction, and the mean growth along all of them.

    Args:
        gradients: Images x features, derivatives of the logit of the class.
        vectors: Directions x features, of length one.
    """
    growth = gradients.astype(np.float64) @ vectors.T.astype(np.float64)
    return tuple((growth > 0).mean(0).tolist()), float(growth.mean())


def p_value(scores: tuple[float, ...], random_scores: tuple[float, ...]) -> float:
    """Return how likely scores and those of a random concept differ as they do by chance; two-sided, paired."""
    differences = np.subtract(scores, random_scores)
    if np.ptp(differences) < EQUAL:
        # The test divides by their deviation.
        return 1.0 if abs(differences[0]) < EQUAL else 0.0
    return float(ttest_rel(scores, random_scores).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
