import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_prune
from hf_prune import Budget, Limits, Plan
from hf_prune.allocate.allocators import ALLOCATORS, Problem
from hf_prune.allocate.budget import cost_of as limited_cost
from hf_prune.analyse.cost import Cost
from hf_prune.errors import BudgetError, PlanError
from hf_prune.score.random import Random

IMAGE = torch.zeros(1, 3, 64, 64)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t").eval()
    return model, hf_prune.analyze(model, IMAGE)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64).eval()
    return model, hf_prune.analyze(model, IMAGE)


def cost_of(model, graph, plan):
    cost = Cost.of(graph)
    sizes = {axis: len(units) for axis, units in plan.on(graph).items()}
    return cost.macs(sizes) / cost.macs({}), cost.params(sizes) / cost.params({})


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_budgets_are_met_and_used_up(network, allocator, request):
    model, graph = request.getfixturevalue(network)
    macs, _ = cost_of(model, graph, hf_prune.plan(model, graph=graph, budget=Budget(macs=0.5), allocator=allocator))
    assert 0.45 < macs <= 0.5
    _, params = cost_of(model, graph, hf_prune.plan(model, graph=graph, budget=Budget(params=0.4), allocator=allocator))
    assert 0.35 < params <= 0.4
    dense = Cost.of(graph).macs({})
    same = hf_prune.plan(model, graph=graph, budget=Budget(macs=dense * 0.5), allocator=allocator)
    assert cost_of(model, graph, same)[0] == pytest.approx(macs)


@settings(max_examples=20)
@given(
    st.floats(0.15, 0.9),
    st.floats(0.15, 0.9),
    st.sampled_from(["uniform", "global_rank", "isomorphic"]),
    st.integers(0, 5),
)
def test_a_smaller_budget_never_gives_a_larger_model(resnet, first, second, allocator, seed):
    model, graph = resnet
    axes = list(graph.axes.values())
    scores = Random(seed=seed).score(model, graph, axes)
    small, large = (
        ALLOCATORS[allocator](Problem(axes, scores, *limited_cost(graph, Budget(macs=share)), Limits()))
        for share in sorted((first, second))
    )
    assert all(small[name] <= large[name] for name in small)


def test_the_best_units_stay():
    model = timm.create_model("resnet10t").eval()
    graph = hf_prune.analyze(model, IMAGE)
    name = "layer3.0.conv1.channels"
    with torch.no_grad():
        for s in graph.axes[name].slices:
            tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[s.name]
            tensor.index_fill_(s.dim, torch.arange(0, graph.axes[name].size, 2), 0)
    plan = hf_prune.plan(model, graph=graph, keep_ratio=0.5)
    assert plan.kept[name] == tuple(range(1, graph.axes[name].size, 2))


def test_limits_hold(vit):
    model, graph = vit
    limits = Limits(kinds=("mlp", "heads"), protect=("blocks.0.*",), round_to=32, min_keep_ratio=0.5)
    plan = hf_prune.plan(model, graph=graph, budget=Budget(params=0.8), limits=limits)
    assert all(not name.startswith("blocks.0") and name != "embed" for name in plan.kept)
    assert {
        graph.axes[name].kind for name in hf_prune.plan(model, graph=graph, keep_ratio=0.5, kinds=["mlp"]).kept
    } == {"mlp"}
    for name, units in plan.kept.items():
        assert len(units) >= graph.axes[name].size // 2
        assert graph.axes[name].kind == "heads" or len(units) % 32 == 0


@pytest.mark.parametrize(
    ("settings_", "error", "message"),
    [
        ({"budget": Budget(macs=0.001)}, BudgetError, "the smallest model within the limits costs"),
        ({"budget": Budget(params=10**12)}, BudgetError, "must be below what the dense model costs"),
        ({}, BudgetError, "give either `budget` or `keep_ratio`"),
        ({"keep_ratio": 1.0}, PlanError, "removes nothing"),
        ({"keep_ratio": 0.5, "limits": Limits(protect=("*",))}, PlanError, "there is nothing to prune"),
        ({"budget": Budget(macs=0.5), "allocator": "isomorph"}, BudgetError, "did you mean isomorphic"),
    ],
)
def test_bad_requests(vit, settings_, error, message):
    model, graph = vit
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        hf_prune.apply_plan(model, hf_prune.plan(model, graph=graph, **settings_), graph)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_bad_budgets_and_limits():
    with pytest.raises(BudgetError, match="must set one of"):
        Budget()
    with pytest.raises(BudgetError, match="must set one of"):
        Budget(macs=0.5, params=0.5)
    with pytest.raises(BudgetError, match="must be positive"):
        Budget(macs=-1)
    with pytest.raises(PlanError, match="did you mean heads"):
        Limits(kinds=("head",))


def test_prune_does_it_all_and_plans_travel_as_json(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64).eval()
    plan = hf_prune.plan(model, IMAGE, budget=Budget(macs=0.5))
    plan.write(tmp_path / "plan.json")
    assert hf_prune.prune(model, IMAGE, budget=Budget(macs=0.5)) is model
    assert model(IMAGE).shape == (1, 1000)
    twin = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64).eval()
    hf_prune.apply_plan(twin, Plan.read(tmp_path / "plan.json"), hf_prune.analyze(twin, IMAGE))
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(PlanError, match="exactly 'kept' and 'sizes'"):
        Plan.read(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="no plan could be read"):
        Plan.read(tmp_path / "absent.json")
