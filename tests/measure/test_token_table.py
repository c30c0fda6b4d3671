import dataclasses
import json

import pytest
import torch
from tiny_models import build_dense, pixel_batch

from hf_prune.errors import LatencyTableError
from hf_prune.measure.token_cost import BlockProbe
from hf_prune.measure.token_table import TokenTable, measure_token_table, table_setting
from hf_prune.tokens.config import TokenPruningConfig

SETTINGS = TokenPruningConfig(before_blocks=(2, 4), keep_ratios=(0.7, 0.4), num_heads=4)


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return measure_token_table(build_dense("vit"), pixel_batch(32), SETTINGS, repeats=9, step=16)


def test_a_measured_table_names_its_setting_and_grows_with_the_tokens(table):
    assert (table.device, table.dtype, table.batch_size) == ("cpu", "float32", 32)
    assert table.threads == torch.get_num_threads()
    assert table.device_name
    assert table.tokens[-1] == 66  # class token, 64 patches, package
    assert table.block_ms[-1] > 1.3 * table.block_ms[0]
    cost = table.cost()
    assert bool((cost.block.diff() >= 0).all())
    assert cost.dense == pytest.approx(table.dense_ms, rel=0.5)
    few, many = cost.of_kept(torch.tensor([[10.0, 5.0], [60.0, 50.0]]), (2, 4))
    assert few < many


def test_a_table_survives_its_file(table, tmp_path):
    path = tmp_path / "table.json"
    table.write(path)
    assert TokenTable.read(path) == table
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.pop("threads"),
        lambda data: data.update(surprise=1),
        lambda data: data.update(format_version=99),
        lambda data: data.update(tokens=[1, 2]),
        lambda data: data["block_ms"].__setitem__(0, -1.0),
        lambda data: data["block_ms"].__setitem__(0, float("inf")),
        lambda data: data.update(tokens=list(reversed(data["tokens"]))),
        lambda data: data.update(tokens=None),
    ],
)
def test_a_spoilt_file_is_refused(table, tmp_path, spoil):
    data = json.loads(json.dumps(dataclasses.asdict(table)))
    spoil(data)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(data))
    with pytest.raises(LatencyTableError, match="no latency table could be read"):
        TokenTable.read(path)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(LatencyTableError, match="leaving `--latency_table` out"):
        TokenTable.read(tmp_path / "nothing.json")
    (tmp_path / "half.json").write_text('{"device": "cp')
    with pytest.raises(LatencyTableError):
        TokenTable.read(tmp_path / "half.json")


def test_a_table_of_another_setting_is_refused(table):
    same = table_setting(BlockProbe(build_dense("vit"), pixel_batch(32), SETTINGS))
    table.require_same_setting(same)
    other_batch = table_setting(BlockProbe(build_dense("vit"), pixel_batch(2), SETTINGS))
    with pytest.raises(LatencyTableError, match="batch_size is 32 in the table and 2 here"):
        table.require_same_setting(other_batch)
    with pytest.raises(LatencyTableError, match="device_name"):
        table.require_same_setting({**same, "device_name": "some phone"})
