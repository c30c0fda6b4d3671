import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_prune.errors import ManifestError
from hf_prune.publish.manifest import Manifest, checkpoint_prefixes
from hf_prune.tokens.config import TokenPruningConfig

MANIFEST = Manifest(
    tokens=TokenPruningConfig(before_blocks=(2, 4), keep_ratios=(0.6, 0.3), num_heads=4),
    blocks="vit.encoder.layer",
    selectors="vit.token_pruning",
    base_model="owner/name",
    created_with={"hf-prune": "0.1.0"},
)
KEYS = [
    "vit.encoder.layer.0.output.dense.weight",
    "vit.encoder.layer.4.output.dense.weight",
    "vit.token_pruning.selectors.2.keep_threshold",
    "vit.token_pruning.selectors.4.keep_threshold",
    "classifier.weight",
]


def test_a_manifest_survives_json():
    assert Manifest.from_dict(json.loads(json.dumps(MANIFEST.to_dict()))) == MANIFEST


def test_prefixes_are_read_from_the_checkpoint():
    assert checkpoint_prefixes(KEYS) == ("vit.encoder.layer", "vit.token_pruning")


def spoilt(**changes):
    data = MANIFEST.to_dict()
    for path, value in changes.items():
        where, *rest = path.split("__")
        if rest:
            data[where] = {**data[where], rest[0]: value}
        else:
            data[where] = value
    return data


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "spvit",
        {},
        spoilt(extra=1),
        spoilt(min_reader_version=3),
        spoilt(min_reader_version="1"),
        spoilt(format_version=None),
        spoilt(tokens={}),
        spoilt(tokens__method="tomme"),
        spoilt(tokens__blocks="../../etc"),
        spoilt(tokens__blocks="a" * 10_000),
        spoilt(tokens__selectors=3),
        spoilt(tokens__num_heads=-1),
        spoilt(tokens__surprise=1),
        spoilt(base_model=3),
        spoilt(created_with=["x"]),
        spoilt(created_with={"x": 1}),
    ],
)
def test_malformed_manifests_are_refused(data):
    with pytest.raises(ManifestError):
        Manifest.from_dict(data)


@given(
    st.dictionaries(
        st.sampled_from([*MANIFEST.to_dict(), "x"]),
        st.none()
        | st.integers()
        | st.text(max_size=8)
        | st.lists(st.integers(), max_size=3)
        | st.just(MANIFEST.to_dict()["tokens"]),
    )
)
def test_anything_else_is_a_manifest_error(data):
    try:
        Manifest.from_dict(data)
    except ManifestError:
        return
    assert set(data) == set(MANIFEST.to_dict())


def test_a_checkpoint_of_another_model_is_refused():
    MANIFEST.require_names(KEYS)
    for keys in (KEYS[:-2], [*KEYS, "vit.token_pruning.selectors.5.keep_threshold"], KEYS[2:], []):
        with pytest.raises(ManifestError, match="different models"):
            MANIFEST.require_names(keys)
