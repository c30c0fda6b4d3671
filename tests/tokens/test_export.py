"""Token-pruned models where shapes must be known: torch.compile, torch.export, ONNX Runtime."""

import onnxruntime
import pytest
import torch
from tiny_models import build_dense, pixel_batch

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.attach import add_token_pruning
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.reducers.registry import REDUCERS
from hf_prune.tokens.site import logits_of

BATCH = torch.export.Dim("batch", min=1, max=64)
NAMES = {"vit": "pixel_values", "timm-vit": "x"}


def reduced(kind, method, runtime="topk"):
    model = build_dense(kind)
    merged = {"merge_ratios": (0.125, 0.125)} if method == "diffrate" else {}
    torch.manual_seed(1)
    settings = TokenPruningConfig(
        before_blocks=(2, 4), keep_ratios=(0.625, 0.375), num_heads=4, method=method, **merged
    )
    pruning = add_token_pruning(model, settings)
    with torch.no_grad():
        for parameter in pruning.parameters():
            parameter.normal_(0, 0.5)
    pruning.runtime = runtime
    return model


@torch.no_grad()
def expected(model, pixels):
    return logits_of(model(pixels))


@pytest.mark.parametrize("method", REDUCERS)
def test_every_method_is_exported_with_any_batch_size(method):
    model, pixels = reduced("timm-vit", method), pixel_batch(5, seed=3)
    program = torch.export.export(model, (pixel_batch(3),), dynamic_shapes=({0: BATCH},))
    with torch.no_grad():
        logits = program.module()(pixels)
    torch.testing.assert_close(logits, expected(model, pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("runtime", ["masked", "topk"])
def test_transformers_models_are_exported_too(runtime):
    model, pixels = reduced("vit", "spvit", runtime), pixel_batch(5, seed=3)
    program = torch.export.export(model, (pixel_batch(3),), dynamic_shapes={"pixel_values": {0: BATCH}})
    with torch.no_grad():
        logits = program.module()(pixels).logits
    torch.testing.assert_close(logits, expected(model, pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "method", "runtime"),
    [("vit", "spvit", "topk"), ("timm-vit", "spvit", "masked"), ("vit", "evit", "auto"), ("timm-vit", "tome", "auto")],
)
def test_onnx_runtime_agrees(kind, method, runtime, tmp_path):
    model, pixels = reduced(kind, method, runtime), pixel_batch(5, seed=3)
    path, shapes = tmp_path / "model.onnx", {NAMES[kind]: {0: BATCH}}
    torch.onnx.export(model, (pixel_batch(3),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    logits = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), expected(model, pixels), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("method", "runtime"), [("spvit", "topk"), ("spvit", "masked"), ("tome", "auto")])
@pytest.mark.parametrize("kind", ["vit", "timm-vit"])
def test_one_graph_is_compiled_for_all(kind, method, runtime):
    torch.compiler.reset()
    model, pixels = reduced(kind, method, runtime), pixel_batch(5, seed=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(expected(compiled, pixels), expected(model, pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("runtime", ["auto", "gathered", "packed"])
def test_exporting_counts_that_depend_on_the_image_names_the_modes_that_work(runtime):
    model = reduced("timm-vit", "spvit", runtime)
    with pytest.raises(UnsupportedModelError, match=r'runtime = "topk".*"masked"'):
        torch.export.export(model, (pixel_batch(3),), dynamic_shapes=({0: BATCH},))
