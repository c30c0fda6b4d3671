import copy

import pytest
import torch
from torch import nn

from hf_prune.recover.norms import recalibrate_norms, settle_norms


def test_norms_are_recalibrated_to_the_mean_over_batches():
    net, x = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(4, momentum=0.9997), nn.ReLU()), torch.randn(48, 4, 5, 5) + 3
    net[0].eval()
    recalibrate_norms(net, [{"pixel_values": part} for part in x.split(16)])
    parts = x.split(16)
    torch.testing.assert_close(net[1].running_mean, torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([p.var((0, 2, 3)) for p in parts]).mean(0))
    assert net[1].momentum == 0.9997
    assert [module.training for module in net] == [False, True, True]


def test_norms_come_back_if_recalibration_fails_and_none_are_needed():
    net, x = nn.Sequential(nn.BatchNorm1d(4)), torch.randn(8, 4)
    net(x)
    state = copy.deepcopy(net.state_dict())

    def data():
        yield x, None
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        recalibrate_norms(net, data())
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert net[0].momentum == 0.1
    recalibrate_norms(nn.Linear(4, 2), None)


def test_only_norms_that_remember_the_last_batch_alone_are_settled():
    x = torch.randn(48, 4, 5, 5) + 3
    for momentum, settled in ((0.1, False), (None, False), (0.9997, True)):
        net = nn.Sequential(nn.BatchNorm2d(4, momentum=momentum))
        settle_norms(net, [{"pixel_values": x}])
        assert bool((net[0].running_mean != 0).any()) == settled
