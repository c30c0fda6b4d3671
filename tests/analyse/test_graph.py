import pytest
import timm
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

from hf_prune.analyse.cost import Cost
from hf_prune.cli import app
from hf_prune.errors import TraceError
from hf_prune.measure.token_cost import count_macs
from hf_prune.pipeline import analyze

TIMM = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4},
    "convnext_atto": {},
    "resnet18": {},
    "mobilenetv3_small_050": {},
    "eva02_tiny_patch14_224": {"img_size": 56},
}


@pytest.fixture(scope="module", params=TIMM)
def analysed(request):
    model = timm.create_model(request.param, **TIMM[request.param]).eval()
    return model, analyze(model, torch.zeros(1, 3, *(TIMM[request.param].get("img_size", 64),) * 2))


def test_axes_of_a_vision_transformer_have_the_names_a_person_would_give():
    graph = analyze(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32))
    found = {name: (axis.kind, axis.size) for name, axis in graph.axes.items()}
    assert found == {
        "embed": ("embed", 192),
        "blocks.0.attn.heads": ("heads", 3),
        "blocks.0.attn.head_dim": ("head_dim", 64),
        "blocks.0.mlp.hidden": ("mlp", 768),
        "blocks.1.attn.heads": ("heads", 3),
        "blocks.1.attn.head_dim": ("head_dim", 64),
        "blocks.1.mlp.hidden": ("mlp", 768),
    }
    assert graph.explain("blocks.1.attn.qkv.weight")[0] == (
        "blocks.1.attn.qkv.stack * blocks.1.attn.heads * blocks.1.attn.head_dim"
    )
    assert graph.frozen["head.output"] == "it is part of the model's output"
    heads = graph.axes["blocks.0.attn.heads"]
    assert {s.name for s in heads.writers} == {"blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"}
    assert [s.name for s in heads.readers] == ["blocks.0.attn.proj.weight"]
    assert "a norm sees" in graph.axes["embed"].inexact
    assert heads.inexact is None
    assert all(line in str(graph) for line in ("blocks.0.mlp.hidden", "frozen: it is part of the model's output"))


def test_axes_of_a_residual_network():
    graph = analyze(timm.create_model("resnet18"), torch.zeros(1, 3, 64, 64))
    assert {axis.kind for axis in graph.axes.values()} == {"channels"}
    assert graph.axes["layer1.0.conv1.channels"].size == 64
    stage = graph.axes["layer3.channels"]
    assert {s.name for s in stage.writers} == {
        "layer3.0.conv2.weight", "layer3.0.downsample.0.weight", "layer3.1.conv2.weight"
    }  # fmt: skip
    assert any(s.name == "layer3.0.bn2.running_var" for s in stage.carriers)


def test_every_dimension_is_explained_and_most_parameters_can_go(analysed):
    model, graph = analysed
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert len(graph.explain(name)) == tensor.ndim
    free = {s.name for axis in graph.axes.values() for s in axis.slices}
    on_free = sum(p.numel() for name, p in model.named_parameters() if name in free)
    assert on_free > 0.97 * sum(p.numel() for p in model.parameters())


def test_the_polynomial_agrees_with_the_dense_model(analysed):
    model, graph = analysed
    cost = Cost.of(graph)
    assert cost.params({}) == sum(parameter.numel() for parameter in model.parameters())
    assert cost.macs({}) == count_macs(lambda: model(graph.inputs))


def test_a_model_is_not_changed_by_its_analysis():
    model = timm.create_model("resnet18")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    analyze(model, torch.zeros(1, 3, 64, 64))
    assert model.training
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_looks_at_numbers_is_traced_by_a_real_run():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            hidden = self.first(x)
            return self.last(hidden if hidden.sum().item() > -1e9 else -hidden)

    graph = analyze(Looks(), torch.ones(1, 4))
    assert graph.recording.by_real_run
    assert [axis.size for axis in graph.axes.values()] == [6]


def test_inputs_may_be_tensors_tuples_or_keywords():
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                                    image_size=16, patch_size=8)  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    pixels = torch.zeros(1, 3, 16, 16)
    expected = list(analyze(model).axes)
    for inputs in (pixels, (pixels,), {"pixel_values": pixels}):
        assert list(analyze(model, inputs).axes) == expected


def quantised():
    model = nn.Linear(4, 2)
    model.weight = nn.Parameter(torch.ones(2, 4, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (quantised(), torch.zeros(1, 4), "quantise afterwards"),
        (nn.Linear(4, 2), torch.zeros(1, 5), "must run on `example_inputs`"),
        (nn.Linear(4, 2), None, "`example_inputs` must be given"),
        (nn.ReLU(), torch.zeros(1, 5), "has no parameters"),
        (nn.Linear(4, 2, device="meta"), torch.zeros(1, 4), "meta device; load the weights"),
        (nn.LazyLinear(4), torch.zeros(1, 4), "run the model once first"),
    ],
)
def test_bad_input(model, inputs, message):
    with pytest.raises(TraceError, match=message):
        analyze(model, inputs)


def test_the_command_line_shows_the_table_and_one_line_errors():
    run = CliRunner().invoke(app, ["analyze", "vit_tiny_patch16_224", "--no-pretrained"])
    assert run.exit_code == 0
    assert "blocks.11.mlp.hidden" in run.output
    run = CliRunner().invoke(app, ["analyze", "no_such_model"])
    assert run.exit_code == 1
    assert "ModelLoadError: no model could be loaded as 'no_such_model'" in run.output
