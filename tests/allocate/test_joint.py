"""Tokens, heads and neurons in one budget: what it costs is known, and what it is worth is measured."""

import copy
import json
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from invented_tables import block_table, operator_table
from tiny_models import NUM_PATCHES, build_dense, pixel_batch

import hf_prune
from hf_prune import Budget, Limits, TokenPruningConfig
from hf_prune.allocate.joint_plan import JointPlan
from hf_prune.errors import BudgetError, LatencyTableError, ManifestError, PlanError, UnsupportedModelError
from hf_prune.joint import apply_joint, plan_joint, reducers_for
from hf_prune.measure.closing import cut_copy
from hf_prune.measure.joint_cost import CostOfTokens, TokenGrid, joint_latency, joint_macs, with_tokens
from hf_prune.measure.token_cost import count_macs, macs_cost
from hf_prune.tokens.attach import token_pruning_of
from hf_prune.tokens.pruning import TokenPruning
from hf_prune.tokens.site import logits_of

PIXELS = pixel_batch(12)
DATA = [(PIXELS, torch.arange(12) % 7)]
SETTINGS = {"stages": (2, 4), "data": DATA}


def tokens_of(method, **making):
    return TokenPruningConfig(before_blocks=(2, 4), keep_ratios=(0.65, 0.35), num_heads=4, method=method, **making)


def halved(graph, places):
    """Return every second unit of all heads and neurons inside blocks."""
    return {
        name: tuple(range(number % 2, axis.size, 2))
        for number, (name, axis) in enumerate(graph.axes.items())
        if axis.kind in ("heads", "mlp") and any(name.startswith(f"{path}.") for path in places)
    }


@pytest.mark.parametrize(
    ("kind", "packages"),
    [("vit", "single"), ("vit", "per_stage"), ("deit-distilled", "single"), ("dinov2-registers", "single"),
     ("siglip", "single"), ("timm-vit", "single"), ("timm-siglip-map", "none"), ("timm-eva02", "single")],
)  # fmt: skip
def test_predicted_macs_are_those_of_the_model_that_is_made(kind, packages):
    dense = build_dense(kind)
    graph, tokens = hf_prune.analyze(dense, PIXELS[:1]), tokens_of("spvit", packages=packages)
    plan = hf_prune.Plan.of(graph, halved(graph, TokenGrid.of(dense, graph).block_paths))
    cost = joint_macs(dense, graph, macs_cost(dense, PIXELS[:1], tokens))
    assert cost(None)({}) == count_macs(lambda: dense(PIXELS[:1]))
    sizes, small = {name: len(units) for name, units in plan.kept.items()}, cut_copy(dense, graph, plan.on(graph))
    assert cost(None)(sizes) == count_macs(lambda: small(PIXELS[:1]))
    made = with_tokens(small, tokens)
    assert cost(tokens)(sizes) == count_macs(lambda: made(PIXELS[:1]))


@pytest.mark.parametrize(
    ("kind", "method"), [("vit", "evit"), ("vit", "tome"), ("siglip", "tome"), ("timm-siglip-map", "class_attention")]
)
def test_what_reads_attention_costs_at_most_what_is_predicted(kind, method):
    model, tokens = build_dense(kind), tokens_of(method)
    graph = hf_prune.analyze(model, PIXELS[:1])
    plan = hf_prune.Plan.of(graph, halved(graph, TokenGrid.of(model, graph).block_paths))
    cost = joint_macs(model, graph, macs_cost(model, PIXELS[:1], tokens))
    for sizes, small in (({}, model), ({n: len(u) for n, u in plan.kept.items()},
                                       cut_copy(model, graph, plan.on(graph)))):  # fmt: skip
        made = with_tokens(copy.deepcopy(small), tokens)
        counted, predicted = count_macs(lambda made=made: made(PIXELS[:1])), cost(tokens)(sizes)
        assert counted <= predicted * (1 + 2e-3)
        assert counted >= predicted * (0.998 if not sizes else 0.95)


def test_the_schedule_that_changes_the_answers_least_is_taken(vit):
    graph = hf_prune.analyze(vit, PIXELS[:1])
    joint = plan_joint(vit, graph=graph, budget=Budget(macs=0.5), method="evit", keeps=(1.0, 0.8, 0.6), **SETTINGS)
    assert joint.dense == count_macs(lambda: vit(PIXELS[:1]))
    assert [len(choice.keep_ratios) for choice in joint.choices] == [0, 2, 2]
    assert all(0.45 * joint.dense < choice.predicted <= joint.limit for choice in joint.choices)
    widths = [choice.kept_widths for choice in joint.choices]
    assert widths == sorted(widths)  # the fewer tokens, the more widths
    best = min(joint.choices, key=lambda choice: choice.divergence)
    assert (joint.tokens.keep_ratios if joint.tokens else ()) == best.keep_ratios
    assert joint.predicted == best.predicted
    # What is on record is what the model that is made really does.
    dense, made = logits_of(vit(PIXELS)).log_softmax(-1), copy.deepcopy(vit)
    record = apply_joint(made, joint, graph)
    answers = logits_of(made(PIXELS)).log_softmax(-1)
    assert F.kl_div(answers, dense, log_target=True, reduction="batchmean").item() == pytest.approx(best.divergence)
    assert record.macs == (joint.dense, count_macs(lambda: made(PIXELS[:1])))
    assert record.macs[1] <= joint.limit


def test_without_schedules_it_is_the_plan_of_the_knapsack(vit):
    graph = hf_prune.analyze(vit, PIXELS[:1])
    joint = plan_joint(vit, graph=graph, budget=Budget(macs=0.6), keeps=(1.0,), **SETTINGS)
    plain = hf_prune.plan(vit, graph=graph, budget=Budget(macs=0.6), criterion="taylor", allocator="knapsack",
                          kinds=("heads", "mlp"), data=DATA)  # fmt: skip
    assert joint.tokens is None
    assert joint.plan == plain


def test_a_model_that_reads_no_patches_loses_tokens_and_one_with_dead_neurons_those(vit):
    graph = hf_prune.analyze(vit, PIXELS[:1])
    blind = copy.deepcopy(vit)
    with torch.no_grad():
        for block in blind.vit.layers[1:]:
            block.attention.o_proj.weight.zero_()
    joint = plan_joint(blind, graph=graph, budget=Budget(macs=0.5), method="evit", keeps=(1.0, 0.8, 0.4), **SETTINGS)
    assert joint.tokens is not None
    idle = copy.deepcopy(vit)
    with torch.no_grad():
        for block in idle.vit.layers:
            block.mlp.fc2.weight[:, 24:] = 0
    joint = plan_joint(
        idle, graph=graph, budget=Budget(macs=0.75), method="evit", keeps=(1.0, 0.9, 0.8), kinds=("mlp",), **SETTINGS
    )
    assert joint.tokens is None
    assert joint.choices[0].divergence < 1e-6 < min(choice.divergence for choice in joint.choices[1:])


def test_tokens_alone_where_they_suffice_and_no_more_than_that(vit):
    graph = hf_prune.analyze(vit, PIXELS[:1])
    joint = plan_joint(vit, graph=graph, budget=Budget(macs=0.9), keeps=(0.7,), **SETTINGS)
    assert not joint.plan.kept
    assert 0.97 * joint.limit < joint.predicted <= joint.limit
    assert joint.tokens.method == "spvit"
    assert joint.tokens.keep_ratios[0] > 0.7
    record = apply_joint(vit, joint, graph)
    assert record.macs == (joint.dense, joint.predicted)
    assert record.difference is None
    assert token_pruning_of(vit).runtime == "auto"
    assert [step.get("tokens", {}).get("method") for step in hf_prune.manifest(vit)["history"]] == ["spvit"]


def test_compensated_trials_are_nearer_and_leave_the_model_alone(vit):
    graph, before = hf_prune.analyze(vit, PIXELS[:1]), {k: v.clone() for k, v in vit.state_dict().items()}
    settings = {"graph": graph, "budget": Budget(macs=0.6), "method": "evit", "keeps": (1.0, 0.8), **SETTINGS}
    plain, fitted = plan_joint(vit, **settings), plan_joint(vit, **settings, compensation="least_squares")
    assert all(b.divergence < a.divergence for a, b in zip(plain.choices, fitted.choices, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
    assert not any(isinstance(module, TokenPruning) for module in vit.modules())


def test_mergers_are_not_asked_for_more_than_they_can(vit):
    joint = plan_joint(vit, hf_prune.analyze(vit, PIXELS[:1]).inputs, budget=Budget(macs=0.5), method="tome",
                       keeps=(0.6, 0.4), **SETTINGS)  # fmt: skip
    assert [choice.keep_ratios[0] for choice in joint.choices] == [0.6]


def test_joint_plans_travel_as_json(vit, tmp_path):
    joint = plan_joint(vit, PIXELS[:1], budget=Budget(macs=0.6), keeps=(1.0, 0.7), **SETTINGS)
    joint.write(tmp_path / "joint.json")
    again = JointPlan.read(tmp_path / "joint.json")
    assert again == joint
    assert again.plan.how == joint.plan.how
    data = json.loads((tmp_path / "joint.json").read_text())
    for broken in ({}, {**data, "more": 1}, {**data, "choices": [{}]}, {**data, "tokens": {"method": "evil"}}):
        with pytest.raises(PlanError):
            JointPlan.from_json(broken)
    with pytest.raises(PlanError, match="no joint plan could be read"):
        JointPlan.read(tmp_path / "none.json")


def test_what_cannot_be_done_is_said(vit):
    graph = hf_prune.analyze(vit, PIXELS[:1])
    with pytest.raises(BudgetError, match="parameters do not become fewer with tokens"):
        plan_joint(vit, graph=graph, budget=Budget(params=0.5), **SETTINGS)
    with pytest.raises(BudgetError, match=r"the smallest model within the limits and the schedules costs"):
        plan_joint(vit, graph=graph, budget=Budget(macs=0.02), keeps=(1.0, 0.8), **SETTINGS)
    with pytest.raises(PlanError, match="an axis inside a block"):
        plan_joint(vit, graph=graph, budget=Budget(macs=0.5), kinds=("embed",), **SETTINGS)
    with pytest.raises(ManifestError, match="must start at 1"):
        plan_joint(vit, graph=graph, budget=Budget(macs=0.5), data=DATA, stages=(0, 2))
    pit = timm.create_model("pit_ti_224", num_classes=7).eval()
    with pytest.raises(UnsupportedModelError, match="one grid of tokens"):
        plan_joint(pit, budget=Budget(macs=0.5), data=DATA)


def invented_tables(model, graph, tokens):
    return operator_table(model, graph, batch_size=2), block_table(model, PIXELS[:2], tokens)


def test_milliseconds_go_block_by_block_with_their_tokens(vit):
    graph, tokens = hf_prune.analyze(vit, PIXELS[:1]), tokens_of("evit")
    tables = invented_tables(vit, graph, tokens)
    cost, found = joint_latency(vit, graph, *tables), TokenGrid.of(vit, graph)
    whole = tables[0].cost(graph, found.place_of)
    assert cost(None)({}) == pytest.approx(tables[0].cost(graph)({}))
    lengths = found.lengths(tokens)
    assert lengths == [65, 65, 1 + 42 + 1, 1 + 42 + 1, 1 + 22 + 1, 1 + 22 + 1, 1 + 22 + 1]
    for sizes in ({}, {name: len(units) for name, units in halved(graph, found.block_paths).items()}):
        by_place = {place: whole.scaled(lambda tag, place=place: float(tag == place))(sizes) for place in range(6)}
        saved = sum(by_place[block] * (1 - lengths[block] / 65) for block in range(6))
        selectors = 2.0 * 0.001 * (65 + 44)
        assert cost(tokens)(sizes) == pytest.approx(whole(sizes) - saved + selectors, rel=2e-2)
    priced = CostOfTokens(cost, tokens, {}, NUM_PATCHES)
    kept = torch.tensor([[42.0, 22.0], [64.0, 64.0]])
    assert priced.of_kept(kept, (2, 4)).tolist()[0] == pytest.approx(cost(tokens)({}))


def test_a_latency_is_met_by_measurement_and_the_widths_give_way(vit, monkeypatch):
    graph, tokens = hf_prune.analyze(vit, PIXELS[:1]), reducers_for(vit, "evit", (2, 4))
    table, token_table = invented_tables(vit, graph, tokens)
    cost, seen = joint_latency(vit, graph, table, token_table), []

    def slower_than_predicted(dense, small, graph, batch_size):
        sizes = {n: graph.axes[n].size for n in graph.axes}
        for name, parameter in small.named_parameters():
            if name.endswith("fc1.weight"):
                sizes[name.replace("fc1.weight", "hidden")] = parameter.shape[0]
            if name.endswith("o_proj.weight"):
                sizes[name.replace("o_proj.weight", "heads")] = parameter.shape[1] // 12
        settings = token_pruning_of(small).settings
        seen.append(settings.keep_ratios)
        return 2.0, 1.15 * 2.0 * cost(settings)(sizes) / cost(None)({})

    monkeypatch.setattr("hf_prune.joint.time_beside", slower_than_predicted)
    joint = plan_joint(vit, graph=graph, budget=Budget(latency_ms=0.5), method="evit", keeps=(0.8,), table=table,
                       token_table=token_table, limits=Limits(min_keep_ratio=0.05), **SETTINGS)  # fmt: skip
    assert joint.measured == pytest.approx(joint.limit, rel=0.05)
    assert joint.predicted == pytest.approx(joint.measured / 1.15, rel=1e-3)
    assert set(seen) == {joint.tokens.keep_ratios}
    assert len(seen) > 1
    assert joint.plan.how["measured latency"].endswith("ms")
    with pytest.raises(LatencyTableError, match="batch_size is 2 in the table and 4 here"):
        plan_joint(vit, graph=graph, budget=Budget(latency_ms=0.5), method="evit", keeps=(0.8,),
                   table=replace(table, batch_size=4), token_table=token_table, **SETTINGS)  # fmt: skip
