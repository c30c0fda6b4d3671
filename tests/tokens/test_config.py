import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_prune.errors import ManifestError
from hf_prune.tokens.config import TokenPruningConfig

GOOD = {
    "before_blocks": [3, 6],
    "keep_ratios": [0.7, 0.49],
    "num_heads": 6,
    "share_head_mlp": False,
    "paper_mlp1": True,
    "packages": "single",
    "method": "spvit",
    "proportional": True,
    "merge_ratios": [],
    "keep_grid": False,
}


def test_settings_survive_json():
    settings = TokenPruningConfig.from_dict(GOOD)
    assert TokenPruningConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert settings.to_dict() == GOOD


def test_settings_of_an_earlier_release_are_read():
    later = {"method", "proportional", "merge_ratios", "keep_grid"}
    assert TokenPruningConfig.from_dict({k: v for k, v in GOOD.items() if k not in later}) == (
        TokenPruningConfig.from_dict(GOOD)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"before_blocks": []},
        {"before_blocks": [6, 3]},
        {"before_blocks": [3, 3]},
        {"before_blocks": [-1, 3]},
        {"before_blocks": [3.0, 6]},
        {"before_blocks": "36"},
        {"before_blocks": [True, 2]},
        {"keep_ratios": [0.7]},
        {"keep_ratios": [0.7, 0.0]},
        {"keep_ratios": [1.2, 0.4]},
        {"keep_ratios": [float("nan"), 0.4]},
        {"keep_ratios": ["0.7", "0.4"]},
        {"keep_ratios": [0.7] * 5000},
        {"num_heads": 0},
        {"num_heads": 2.0},
        {"share_head_mlp": 1},
        {"packages": "three"},
        {"method": "spvitt"},
        {"method": None},
        {"method": "evit", "before_blocks": [0, 6]},
        {"merge_ratios": [0.1, 0.1]},
        {"method": "diffrate", "merge_ratios": [0.1]},
        {"method": "diffrate", "merge_ratios": [0.31, 0.1]},
        {"proportional": 0},
        {"keep_grid": None},
        {"unknown": 1},
    ],
)
def test_values_out_of_range_are_refused(change):
    with pytest.raises(ManifestError):
        TokenPruningConfig.from_dict({**GOOD, **change})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, "x"]), inner, max_size=6),
        max_leaves=12,
    )
)
def test_anything_else_is_a_manifest_error(data):
    try:
        settings = TokenPruningConfig.from_dict(data)
    except ManifestError:
        return
    assert settings.to_dict().keys() == GOOD.keys()
