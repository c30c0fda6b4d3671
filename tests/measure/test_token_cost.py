import pytest
import torch
from tiny_models import COST, NUM_PATCHES, build_dense, build_pruned, pixel_batch

from hf_prune.measure.token_cost import count_macs, macs_cost
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.config import TokenPruningConfig


@pytest.mark.parametrize("packages", ["single", "per_stage"])
def test_predicted_macs_equal_a_recount_of_the_pruned_model(dense, packages):
    settings = TokenPruningConfig(before_blocks=(2, 4), keep_ratios=(0.65, 0.3), num_heads=4, packages=packages)
    image = pixel_batch(1)
    cost = macs_cost(dense, image, settings)
    assert cost.dense == count_macs(lambda: dense(image))
    assert cost.num_patches == NUM_PATCHES
    build_pruned(dense, settings)
    for seed in (3, 4):
        image = pixel_batch(1, seed=seed)
        counted = count_macs(lambda image=image: dense(image))
        kept = torch.stack([record.keep.sum() for record in token_pruning_of(dense).take_records()])
        predicted = cost.of_kept(kept[None], (2, 4))
        assert predicted.item() == counted


def test_macs_of_deit_small_are_those_of_the_formula():
    """4NC^2 + 2N^2C + 8NC^2 a block, N*16*16*3*C for the patches, C*1000 for the head."""
    import transformers

    config = transformers.DeiTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000, num_hidden_layers=2
    )
    with torch.device("meta"):
        model = transformers.DeiTForImageClassification(config).eval()
        image = torch.randn(1, 3, 224, 224)
        counted = count_macs(lambda: model(image))
    n, c = 198, 384
    assert counted == 2 * (12 * n * c * c + 2 * n * n * c) + 196 * 768 * c + 1000 * c


def test_cost_is_differentiable_and_interpolates():
    kept = torch.tensor([[10.5, 4.0]], requires_grad=True)
    cost = COST.of_kept(kept, (3, 6))
    between = (
        COST.of_kept(torch.tensor([[10.0, 4.0]]), (3, 6)) + COST.of_kept(torch.tensor([[11.0, 4.0]]), (3, 6))
    ) / 2
    assert cost.item() == pytest.approx(between.item())
    cost.sum().backward()
    assert kept.grad[0, 0] == pytest.approx(3 + 0.1)  # three blocks and the second selector see these patches
    assert kept.grad[0, 1] == pytest.approx(6)


def test_an_untouched_model_costs_its_parts():
    everything = COST.of_kept(torch.tensor([64.0]), (6,))
    assert COST.dense == 5 + 12 * 65
    assert everything.item() == pytest.approx(5 + 6 * 65 + 6.5 + 6 * 66)


def test_only_the_probe_ran_the_model():
    model = build_dense("vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    macs_cost(model, pixel_batch(1), TokenPruningConfig(before_blocks=(2,), keep_ratios=(0.5,), num_heads=4))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["vit", "timm-siglip-map"])
@pytest.mark.parametrize("method", ["tome", "evit", "class_attention", "random", "dynamicvit", "pitome"])
def test_predicted_macs_of_every_method_equal_a_recount(kind, method):
    dense, image = build_dense(kind), pixel_batch(1)
    settings = TokenPruningConfig(method=method, before_blocks=(2, 4), keep_ratios=(0.625, 0.375), num_heads=4)
    cost = macs_cost(dense, image, settings)
    add_token_pruning(dense, settings)
    predicted = cost.of_kept(torch.tensor([40.0, 24.0]), (2, 4)).item()
    # PiToMe compares within the crowd that goes, whose size at one stage is not that at the other.
    assert predicted == pytest.approx(count_macs(lambda: dense(image)), rel=2e-3 if method == "pitome" else 0)
