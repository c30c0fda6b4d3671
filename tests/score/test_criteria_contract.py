"""What every criterion of the registry must do, whichever it is."""

import copy
import dataclasses

import pytest
import torch
from score_nets import batches, kill_unit, permute_units

from hf_prune.score.bn_scale import BnScale
from hf_prune.score.grasp import Grasp
from hf_prune.score.magnitude import Magnitude
from hf_prune.score.random import Random
from hf_prune.score.registry import CRITERIA, criterion

NEEDY = [name for name in CRITERIA if criterion(name).needs != "none"]
# On networks without BatchNorm bn_scale says so, unless it is told what to do instead.
INSTANCES = [*CRITERIA, BnScale(fallback=Magnitude())]


@pytest.fixture(params=INSTANCES, ids=[name if isinstance(name, str) else "bn_scale+fallback" for name in INSTANCES])
def rule(request):
    found = criterion(request.param)
    if found == BnScale() and "case" in request.fixturenames and not request.getfixturevalue("case").has_batch_norm:
        pytest.skip("a transformer has no BatchNorm")
    # A few steps take the road that many take.
    return dataclasses.replace(found, steps=5) if goes_by_steps(found) else found


def goes_by_steps(rule):
    """Whether a criterion removes units while it scores, so that what an axis scores hangs on the others."""
    return hasattr(rule, "steps")


def test_scores_are_finite_non_negative_and_one_a_unit(rule, case):
    scores = case.score(rule)
    assert list(scores) == [axis.name for axis in case.axes]
    for axis in case.axes:
        values = scores[axis.name]
        assert values.shape == (axis.size,)
        assert values.dtype == torch.float32
        assert values.device.type == "cpu"
        assert not values.requires_grad
        assert values.isfinite().all()
        assert (values >= 0).all()
        assert values.unique().numel() > 1, "every unit scores the same"


def test_scores_are_the_same_again_and_for_some_axes_alone(rule, case):
    scores, again = case.score(rule), case.score(rule)
    alone = case.score(rule, case.axes[1:2])
    assert list(alone) == [case.axes[1].name]
    for name, values in again.items():
        assert torch.equal(scores[name], values)
    if not goes_by_steps(rule):
        torch.testing.assert_close(alone[case.axes[1].name], scores[case.axes[1].name])


def test_scores_follow_a_permutation_of_units(rule, case):
    if isinstance(rule, Random):
        pytest.skip("random scores hang on the position")
    before = case.score(rule)
    for axis in {axis.kind: axis for axis in case.axes}.values():
        order = torch.randperm(axis.size, generator=torch.Generator().manual_seed(1))
        permuted = case.copy()
        permute_units(permuted.model, axis, order)
        after = permuted.score(rule)
        for name, values in before.items():
            expected = values[order] if name == axis.name else values
            torch.testing.assert_close(after[name], expected, rtol=2e-3, atol=2e-5 * float(values.max()))


def test_channels_last_changes_nothing(rule, convnet):
    scores = convnet.score(rule)
    convnet.model.to(memory_format=torch.channels_last)
    for name, values in convnet.score(rule).items():
        torch.testing.assert_close(values, scores[name], rtol=1e-3, atol=1e-5 * float(values.max()))


def test_dead_unit_scores_lowest(rule, convnet):
    if isinstance(rule, Random):
        pytest.skip("random scores do not look")
    if isinstance(rule, Grasp):
        pytest.skip("units that hold gradients back go before those that do nothing")
    for axis, unit in zip(convnet.axes, (3, 7, 30), strict=True):
        dead = convnet.copy()
        kill_unit(dead.model, axis, unit)
        assert dead.score(rule)[axis.name].argmin() == unit


def test_model_is_left_as_it_was(rule, case):
    case.model.train()
    next(case.model.children()).eval()
    parameters = list(case.model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    before = snapshot(case.model)
    state = copy.deepcopy(case.model.state_dict())
    case.score(rule)
    assert snapshot(case.model) == before
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def snapshot(model):
    """Modes, hooks, and which gradients there are."""
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    parameters = [(p.requires_grad, id(p.grad), len(p._backward_hooks or ())) for p in model.parameters()]
    hooks = [len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in model.parameters()]
    return modules, parameters, hooks, torch.is_grad_enabled()


@pytest.mark.parametrize("name", NEEDY)
def test_model_is_left_as_it_was_when_data_raise(name, case):
    def broken():
        yield case.data[0]
        raise OSError("the disk is gone")

    case.model.train()
    before = snapshot(case.model)
    with pytest.raises(OSError, match="the disk is gone"):
        criterion(name).score(case.model, case.graph, case.axes, broken())
    assert snapshot(case.model) == before
    assert all(parameter.grad is None for parameter in case.model.parameters())


def test_criterion_says_what_it_needs(rule, convnet):
    assert rule.needs in ("none", "forward", "backward")
    assert isinstance(rule.comparable, bool)
    assert dataclasses.is_dataclass(rule)
    if rule.needs == "none":
        assert rule.score(convnet.model, convnet.graph, convnet.axes, None)


# Random looks at nothing; activations are what arrives at readers, whatever they make of it, and BatchNorm scale is
# of norms only; magnitudes are of weights, FPGM of those with more than a scale, WHC of all layers.
MEMBERS = {"magnitude": "weights", "lamp": "weights", "fpgm": "layers", "whc": "all", "taylor": "all", "fisher": "all",
           "activation": "writers carriers", "bn_scale": "scales", "snip": "all", "grasp": "all"}  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_score_changes_when_any_member_changes(name, convnet):
    rule, parameters, data = criterion(name), dict(convnet.model.named_parameters()), batches(8, 4)
    for axis in convnet.axes:
        before = convnet.score(rule, [axis], data)[axis.name]
        members = axis.slices if MEMBERS[name] != "writers carriers" else axis.writers + axis.carriers
        if MEMBERS[name] == "scales":
            members = [m for m in axis.carriers if m.name.endswith("weight")]
        if MEMBERS[name] == "weights":
            members = [m for m in axis.slices if m.name.endswith("weight")]
        if MEMBERS[name] == "layers":
            members = [m for m in axis.writers + axis.readers if m.name.endswith("weight")]
        for member in members:
            if member.name not in parameters:
                continue
            rows = parameters[member.name].data.movedim(member.dim, 0)
            kept = rows.clone()
            # Not the largest, which has LAMP 1 whatever happens, nor the smallest, which may be dead.
            unit = int(before.argsort()[axis.size // 2])
            # Away from zero, so that no norm happens to stay what it was.
            rows[member.units == unit] = 3 * rows[member.units == unit] + 0.5 * rows[member.units == unit].sign()
            after = convnet.score(rule, [axis], data)[axis.name]
            rows.copy_(kept)
            assert abs(after[unit] - before[unit]) > 1e-3 * before[unit], member.name
