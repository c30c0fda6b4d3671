import copy

import pytest
import timm
import torch
import transformers

import hf_prune
from hf_prune.analyse.axes import Axis, size_after, size_of
from hf_prune.errors import LatencyTableError
from hf_prune.measure.operator_times import measure_operator
from hf_prune.measure.operators import Operator, TensorSpec, operators_of
from hf_prune.measure.token_cost import count_macs

CPU = torch.device("cpu")
IMAGE = torch.zeros(1, 3, 64, 64)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
MODELS = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 2, 1, 1)),
    "convnext": lambda: timm.create_model("convnext_atto"),
    "convnext, wider": lambda: timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(32, 64, 96, 128)),
    "resnet": lambda: timm.create_model("resnet26"),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050"),
    "hf vit": lambda: transformers.ViTModel(transformers.ViTConfig(image_size=64, patch_size=16, **SMALL)),
    "hf eager": lambda: transformers.ViTModel(
        transformers.ViTConfig(image_size=64, patch_size=16, attn_implementation="eager", **SMALL)
    ),
    "groups": lambda: timm.create_model("regnetx_002"),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def macs_of(operators, sizes, batch):
    """Run every operator at the shapes that axes of some sizes give it."""
    after = {batch.axes[name].leaf: size for name, size in sizes.items()}
    runs = [op.runner([size_after(dim, after) for dim in op.dims], CPU) for op in operators]
    return count_macs(lambda: [run() for run in runs])


def test_the_operators_do_the_work_of_the_model_dense_and_cut(model):
    graph = hf_prune.analyze(model, IMAGE)
    batch, operators = operators_of(graph, 3)
    assert macs_of(operators, {}, batch) == count_macs(lambda: model(IMAGE.repeat(3, 1, 1, 1)))
    plan = hf_prune.plan(model, graph=graph, keep_ratio=0.5)
    small = copy.deepcopy(model)
    hf_prune.apply_plan(small, plan, graph, verify=False)
    sizes = {name: len(kept) for name, kept in plan.kept.items()}
    assert macs_of(operators, sizes, batch) == count_macs(lambda: small(IMAGE.repeat(3, 1, 1, 1)))


def test_equal_blocks_have_equal_keys_and_axes_of_their_own():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()
    _, operators = operators_of(hf_prune.analyze(model, IMAGE), 1)
    attention = [op for op in operators if op.key.startswith("attention")]
    assert len(attention) == 3
    assert len({op.key for op in attention}) == 1
    assert len({op.dims for op in attention}) == 3
    assert [size_of(dim) for dim in attention[0].dims] == [3, 64]


def test_layouts_are_kept():
    model = timm.create_model("resnet10t").eval().to(memory_format=torch.channels_last)
    image = torch.zeros(1, 3, 64, 64).to(memory_format=torch.channels_last)
    _, operators = operators_of(hf_prune.analyze(model, image), 2)
    convolution = next(op for op in operators if op.is_convolution)
    out = convolution.runner([size_of(dim) for dim in convolution.dims], CPU)()
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert "@0231" in convolution.key.split()[1]  # the image itself


def test_the_analysed_model_is_left_as_it_was(model):
    graph = hf_prune.analyze(model, IMAGE)
    before = graph.table()
    operators_of(graph, 2)
    assert graph.table() == before
    assert operators_of(graph, 2)[1][0].key == operators_of(graph, 2)[1][0].key


def test_an_operator_that_runs_at_no_other_size_is_named():
    x = TensorSpec((Axis(64),), (0,), torch.float32, False)
    op = Operator("view [a64] 64", torch.ops.aten.view.default, (x, [64]), {}, x.dims)
    with pytest.raises(LatencyTableError, match=r"'view \[a64\] 64' does not run at \(16,\)"):
        measure_operator(op, CPU, 16)
