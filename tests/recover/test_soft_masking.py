import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import build_dense, pixel_batch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_prune.allocate.allocators import Limits, Problem
from hf_prune.allocate.budget import Budget, cost_of
from hf_prune.errors import BudgetError, PlanError, RecipeError
from hf_prune.pipeline import analyze, apply_plan
from hf_prune.recover.checkpoints import Checkpoints
from hf_prune.recover.loop import PhaseSettings, train_phase
from hf_prune.recover.objectives import Classify
from hf_prune.recover.soft_masking import Rewiring, RewiringSchedule, SoftMasking, maskable
from hf_prune.surgery.masks import masked_weights

NUM_SIGNALS, NUM_HIDDEN = 4, 16


def signals_and_noise():
    """Hidden units 0 to 3 say all about the class, the others are noise; only what reads them is trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, 4))
    with torch.no_grad():
        model[0].weight[:, :2] = 0
        model[0].weight[:NUM_SIGNALS] = 0
        model[0].weight[:NUM_SIGNALS, :2] = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
        model[0].bias.zero_()
    model[0].requires_grad_(False)
    pixels = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    return model, {"pixel_values": pixels, "labels": (pixels[:, 0] > 0).long() * 2 + (pixels[:, 1] > 0).long()}


def small_net():
    """Two plain convolutions, a depthwise one and a head, with batch norms."""
    torch.manual_seed(0)

    def conv(before, after, **settings):
        return [nn.Conv2d(before, after, 3, padding=1, bias=False, **settings), nn.BatchNorm2d(after), nn.ReLU()]

    layers = [*conv(3, 12), *conv(12, 16), *conv(16, 16, groups=16), *conv(16, 12)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 7))


def soft_masking(model, inputs, *, mode="soft", macs=0.5, scaling="none", every=3, **schedule):
    AcceleratorState._reset_state(reset_partial_state=True)
    graph = analyze(model, inputs)
    problem = Problem(maskable(graph.axes.values()), {}, *cost_of(graph, Budget(macs=macs)), Limits())
    timing = RewiringSchedule(every=every, **schedule)
    return SoftMasking(model, graph, Classify(), problem, Accelerator(cpu=True), mode, timing, norm_scaling=scaling)


def fit(objective, batch, num_steps, optimizer=None, watch=lambda step: None):
    optimizer = optimizer or torch.optim.SGD(objective.model.parameters(), lr=0.1, momentum=0.9)
    for step in range(num_steps):
        objective.loss(objective.model, batch, batch_number=step).backward()
        objective.before_step((step + 1) / num_steps)
        optimizer.step()
        optimizer.zero_grad()
        watch(step + 1)
        objective.after_step()


@pytest.mark.parametrize(("ramp", "middle"), [
    ("exp", 0.6 * (1 - math.exp(-1.375)) / (1 - math.exp(-2.75))), ("exp2", 1 - 0.4**0.5), ("linear", 0.3),
])  # fmt: skip
def test_the_ramp_grows_from_nothing_to_the_whole_ratio(ramp, middle):
    schedule = RewiringSchedule(ramp=ramp)
    ratios = [schedule.ratio(epoch / 90, 0.6) for epoch in (0, 10, 37.5, 65, 90)]
    assert ratios == pytest.approx([0, 0, middle, 0.6, 0.6])


@pytest.mark.parametrize("wrong", [{"every": 0}, {"warmup_share": 0.6, "cooldown_share": 0.4}, {"ramp": "steep"}])
def test_schedules_that_leave_nothing_are_refused(wrong):
    with pytest.raises(RecipeError):
        RewiringSchedule(**wrong)


def test_importance_is_the_absolute_sum_of_weight_times_gradient_over_readers():
    model = small_net()
    objective = soft_masking(model, torch.zeros(1, 3, 8, 8))
    readers = {
        name: [s.name.removesuffix(".weight") for s in objective.graph.axes[name].readers] for name in objective.masks
    }
    assert sorted(readers.values()) == [["14"], ["3"], ["9"]]
    batch = {"pixel_values": pixel_batch(8)[:, :, :8, :8], "labels": torch.arange(8) % 7}
    objective.masks["0.channels"].importance.copy_(torch.arange(12.0))
    objective.masks["0.channels"].keep_best(7)
    expected = {name: [] for name in objective.masks}
    for step in range(3):
        objective.loss(model, batch, batch_number=step).backward()
        for name, (layer,) in readers.items():
            weight = model.get_submodule(layer).parametrizations.weight.original
            others = [d for d in range(weight.ndim) if d != 1]
            expected[name].append((weight * weight.grad).sum(others).abs().detach())
        objective.before_step(0.0)
        model.zero_grad()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    for name, (first, second, third) in expected.items():
        mean = 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third
        torch.testing.assert_close(objective.masks[name].importance, mean)
        assert (mean > 0).any()
    assert (objective.masks["0.channels"].importance[:5] > 0).any(), "masked units must be worth something, too"


def test_a_step_that_is_not_finite_is_not_looked_at():
    model, batch = signals_and_noise()
    objective = soft_masking(model, batch["pixel_values"][:1])
    (mask,) = objective.masks.values()
    objective.loss(model, batch, batch_number=0).backward()
    objective.before_step(0.0)
    before = mask.importance.clone()
    model[2].parametrizations.weight.original.grad[0, 5] = math.inf
    objective.before_step(0.0)
    assert torch.equal(mask.importance, before)
    assert mask.num_seen == 1
    assert before.any()


def test_masked_slices_alone_decay():
    model, batch = signals_and_noise()
    objective = soft_masking(model, batch["pixel_values"][:1])
    (mask,), (weight,) = objective.masks.values(), masked_weights(model)
    mask.kept[3] = 0
    objective.loss(model, batch, batch_number=0).backward()
    gradient = weight.original.grad.clone()
    objective.pruned_decay = 0.5
    objective.before_step(0.0)
    added = weight.original.grad - gradient
    torch.testing.assert_close(added[:, 3], 0.5 * weight.original.detach()[:, 3])
    assert not added[:, [0, 1, 2, *range(4, NUM_HIDDEN)]].any()


@pytest.mark.parametrize("mode", ["soft", "permanent"])
def test_units_that_were_masked_by_mistake_come_back_in_the_soft_mode_alone(mode):
    model, batch = signals_and_noise()
    objective = soft_masking(model, batch["pixel_values"][:1], mode=mode, macs=0.65, cooldown_share=0.1, ramp="exp")
    (mask,) = objective.masks.values()
    after_first = []

    def corrupt(step):
        if step == 15:
            # The first decision with something to prune takes the best for the worst.
            mask.importance.copy_(mask.importance.max() - mask.importance)
        if step == 16:
            after_first.extend(mask.kept[:NUM_SIGNALS].tolist())

    fit(objective, batch, 120, watch=corrupt)
    history = objective.rewirings
    assert len(history) >= 10
    assert 0 in after_first
    returned = sum(rewiring.num_returned for rewiring in history)
    if mode == "soft":
        assert returned >= 1
        assert mask.kept[:NUM_SIGNALS].all()
    else:
        assert returned == 0
        assert not mask.kept[:NUM_SIGNALS].all()
    assert sum(rewiring.num_pruned for rewiring in history) - returned == NUM_HIDDEN - mask.num_kept > 0


@pytest.mark.parametrize(("kind", "macs", "scaling"), [("conv", 0.4, "prune_frac"), ("conv", 0.6, "importance_frac"),
                                                       ("vit", 0.6, "none")])  # fmt: skip
def test_every_decision_is_within_its_budget_and_the_cut_is_what_was_trained(kind, macs, scaling):
    model = small_net() if kind == "conv" else build_dense("vit")
    size = 8 if kind == "conv" else 32
    objective = soft_masking(model, torch.zeros(1, 3, size, size), macs=macs, scaling=scaling, every=2)
    batch = {"pixel_values": pixel_batch(8)[:, :, :size, :size], "labels": torch.arange(8) % 7}
    fit(objective, batch, 12, torch.optim.SGD(model.parameters(), lr=1e-2))
    history = objective.rewirings
    assert len(history) >= 4
    assert all(rewiring.cost <= 1 - rewiring.pruning_ratio + 1e-9 for rewiring in history)
    assert [r.pruning_ratio for r in history] == sorted(r.pruning_ratio for r in history)
    assert history[-1].pruning_ratio == pytest.approx(1 - macs)
    model.eval()
    masked = objective_logits(model, batch)
    sizes = {name: mask.num_kept for name, mask in objective.masks.items()}
    if scaling == "prune_frac":
        assert {float(scale.scale) for scale in objective.norm_scales.values()} != {1.0}
    done = apply_plan(model, objective.finish(), objective.graph)
    cut = objective_logits(model, batch)
    assert (cut - masked).abs().max() <= 1e-4 * masked.abs().max().clamp_min(1)
    assert done.macs[1] == objective.problem.cost(sizes) <= objective.problem.limit
    assert sum(p.numel() for p in model.parameters()) == done.params[1]


@torch.no_grad()
def objective_logits(model, batch):
    out = model(batch["pixel_values"])
    return getattr(out, "logits", out)


def test_masks_stay_as_they_are_after_the_last_decision():
    model, batch = signals_and_noise()
    objective = soft_masking(model, batch["pixel_values"][:1], cooldown_share=0.5)
    seen = []
    fit(objective, batch, 40, watch=lambda step: seen.append(next(iter(objective.masks.values())).kept.clone()))
    assert objective.final
    assert objective.rewirings[-1].step == 20
    assert all(torch.equal(kept, seen[-1]) for kept in seen[20:])


def test_a_budget_below_the_smallest_model_is_refused():
    model, batch = signals_and_noise()
    objective = soft_masking(model, batch["pixel_values"][:1])
    objective.problem = replace(objective.problem, limit=1.0)
    with pytest.raises(BudgetError, match="smallest model"):
        fit(objective, batch, 40)


def test_axes_without_readers_of_their_own_are_refused():
    model = build_dense("vit")
    graph = analyze(model)
    problem = Problem(list(graph.axes.values()), {}, *cost_of(graph, Budget(macs=0.5)), Limits())
    with pytest.raises(PlanError, match="read by layers alone"):
        SoftMasking(model, graph, Classify(), problem, Accelerator(cpu=True))
    assert {axis.kind for axis in maskable(problem.axes)} == {"heads", "head_dim", "mlp"}


class Stop(Exception):  # noqa: N818 (not an error: the plug is pulled)
    pass


class Examples(TensorDataset):
    def __getitem__(self, index):
        return {"pixel_values": self.tensors[0][index], "labels": self.tensors[1][index]}


def train(folder, *, stop_at=None, resume=False):
    model = small_net()
    objective = soft_masking(model, torch.zeros(1, 3, 8, 8), scaling="importance_frac", every=3, warmup_share=0.0)
    objective.pruned_decay = 0.1
    if stop_at is not None:
        after_step = objective.after_step

        def counted():
            if objective.step == stop_at:
                raise Stop
            return after_step()

        objective.after_step = counted
    settings = PhaseSettings(epochs=4.0, learning_rate=1e-2, weight_decay=0.05, shapes={"": lambda progress: 1.0},
                             seed=3, logging_steps=1)  # fmt: skip
    images = Examples(pixel_batch(16)[:, :, :8, :8].contiguous(), torch.arange(16) % 7)
    model = train_phase("smcp", model, objective, DataLoader(images, batch_size=4), settings,
                        accelerator=objective.accelerator, log_path=folder / "log.jsonl",
                        checkpoints=Checkpoints(folder, objective.accelerator, {}, resume=resume, every=2))  # fmt: skip
    return model.state_dict(), objective.state_dict()


def test_a_resumed_run_decides_and_ends_as_an_uninterrupted_one(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, state = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path / "cut", stop_at=5)
    resumed, resumed_state = train(tmp_path / "cut", resume=True)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    assert any(".mask.importance" in name for name in whole)
    assert resumed_state == state
    assert [Rewiring(**rewiring).step for rewiring in state["rewirings"]] == [3, 6, 9, 12]
    finished, finished_state = train(tmp_path / "cut", resume=True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in finished.items())
    assert finished_state == state
