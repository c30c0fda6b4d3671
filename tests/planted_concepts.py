"""Pictures in which it is known what their class consists of, and a network that learns them in seconds."""

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from torch import nn

from hf_prune.data.concepts.discover import discover_concepts
from hf_prune.data.concepts.settings import ConceptSettings
from hf_prune.data.images import ImageSplits
from hf_prune.data.transforms import Preprocessing

SIDE_PX, PATTERN_PX, NUM_CLASSES = 32, 11, 4
PREPROCESSING = Preprocessing(size_px=(SIDE_PX, SIDE_PX), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
ROWS, COLUMNS = np.mgrid[:PATTERN_PX, :PATTERN_PX]
# What is planted: a colour with darker stripes or checks. The last two belong to no class.
COLOURS = [(220, 50, 40), (40, 170, 60), (50, 80, 220), (220, 190, 40), (170, 60, 190), (40, 180, 190)]
DARKER = [ROWS % 3 == 0, COLUMNS % 3 == 0, (ROWS + COLUMNS) % 3 == 0, ROWS // 2 % 2 == COLUMNS // 2 % 2] * 2
DISTRACTORS = (NUM_CLASSES, NUM_CLASSES + 1)


def planted_picture(label, rng):
    """Return a picture `(32, 32, 3)` and what lies where: -1 for the ground, else the number of a pattern."""
    picture = np.full((SIDE_PX, SIDE_PX, 3), rng.integers(90, 150, 3), float)
    places = np.full((SIDE_PX, SIDE_PX), -1)
    # Quarters of the picture, of which one stays empty.
    corners = rng.permutation([(0, 0), (0, 16), (16, 0), (16, 16)])
    for pattern, corner in zip((label, *DISTRACTORS), corners, strict=False):
        top, left = corner + rng.integers(0, 16 - PATTERN_PX + 1, 2)
        box = np.s_[top : top + PATTERN_PX, left : left + PATTERN_PX]
        picture[box] = COLOURS[pattern]
        picture[box][DARKER[pattern]] *= 0.7
        places[box] = pattern
    picture += rng.normal(0, 6, picture.shape)
    return picture.clip(0, 255).astype(np.uint8), places


def planted_rows(per_class, seed=0):
    """Return pictures, places and labels, sorted by class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(NUM_CLASSES), per_class)
    pictures, places = zip(*(planted_picture(label, rng) for label in labels), strict=True)
    return np.stack(pictures), np.stack(places), labels


def splits_of_pictures(pictures, labels, num_labels=NUM_CLASSES):
    """Wrap pictures as a dataset."""
    names = [f"class {label}" for label in range(num_labels)]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=names)})
    images = [Image.fromarray(picture) for picture in pictures]
    rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    return ImageSplits(
        train=rows,
        validation=rows,
        test=rows,
        label_names=tuple(names),
        image_column="image",
        label_column="label",
        source="planted",
    )


def small_net(num_classes=NUM_CLASSES, seed=0):
    """Return an untrained network whose bottleneck is a map, with a head that is not linear."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32)]
    body = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, num_classes)
    )
    return nn.Sequential(body, head).eval()


def trained_net(pictures, labels, steps=60, seed=0):
    """Return the network after some steps of Adam."""
    net = small_net(int(max(labels)) + 1, seed).train()
    images = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    targets = torch.as_tensor(labels)
    adam, generator = torch.optim.Adam(net.parameters(), lr=3e-3), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=generator)
        loss = F.cross_entropy(net(images[batch]), targets[batch])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return net.eval()


# Enough for a few concepts, and over in a second.
QUICK = ConceptSettings(
    images_per_class=10,
    min_images=5,
    segment_counts=(5, 10),
    num_clusters=6,
    kmeans_starts=1,
    min_segments=3,
    max_segments=8,
    num_random_sets=3,
    unranked_segments=20,
    max_p_value=0.2,
)


def quick_concepts(folder, settings=QUICK, net=None, labels=None, splits=None):
    """Find concepts of planted pictures with an untrained teacher."""
    if splits is None:
        pictures, _, truth = planted_rows(12)
        splits = splits_of_pictures(pictures, truth)
    net = small_net() if net is None else net
    return discover_concepts(net, splits, folder, preprocessing=PREPROCESSING, settings=settings, labels=labels)
