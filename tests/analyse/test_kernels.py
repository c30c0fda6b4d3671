"""What the short way says of a result is what torch says, down to dtype and strides."""

import pytest
import torch

from hf_prune.analyse.kernels import compute

ATEN = torch.ops.aten
FEATURES = {"device": "meta", "dtype": torch.float64}


def image(*shape, channels_last=False):
    made = torch.empty(shape, **FEATURES)
    return made.to(memory_format=torch.channels_last) if channels_last else made


def vector(size):
    return torch.empty(size, **FEATURES)


CALLS = [
    (ATEN.addmm.default, (vector(7), image(5, 3), image(3, 7))),
    (ATEN.addmm.default, (vector(7), image(5, 3), image(7, 3).t())),
    (ATEN.native_layer_norm.default, (image(2, 5, 6), [6], vector(6), None, 1e-6)),
    (ATEN.native_layer_norm.default, (image(2, 6, 5).transpose(1, 2), [6], vector(6), vector(6), 1e-6)),
    (ATEN.native_batch_norm.default, (image(2, 4, 6, 6, channels_last=True), *[vector(4)] * 4, False, 0.1, 1e-5)),
    (ATEN._softmax.default, (image(2, 3, 4), -1, False)),
    (ATEN._safe_softmax.default, (image(2, 3, 4), -1)),
    (ATEN.gelu.default, (image(2, 4, 6, 6, channels_last=True),)),
    (ATEN.add.Tensor, (image(2, 3, 4), vector(4))),
    (ATEN.add.Tensor, (vector(4), image(2, 3, 4))),
    (ATEN.mul.Tensor, (image(2, 3, 4), 0.5)),
    (ATEN.mul.Scalar, (image(2, 3, 4), 2)),
    (ATEN.div.Tensor, (image(2, 3, 4), image(2, 1, 4))),
    (ATEN.sub.Tensor, (image(2, 3, 4).expand(2, 3, 4), image(3, 4), )),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0]._schema.name)
def test_the_short_way_agrees_with_torch(call):
    func, args = call
    short, full = (out if isinstance(out, tuple) else (out,) for out in (compute(func, args, {}), func(*args)))
    if func is ATEN.native_batch_norm.default:  # there is nothing in the others but on some devices
        assert [t.numel() for t in short[1:]] == [0, 0]
        short, full = short[:1], full[:1]
    assert [facts(t) for t in short] == [facts(t) for t in full]


def facts(tensor):
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def test_numbers_are_computed_by_torch():
    x = torch.rand(2, 3)
    assert torch.equal(compute(ATEN.gelu.default, (x,), {}), torch.nn.functional.gelu(x))
    assert torch.equal(compute(ATEN.add.Tensor, (x, x), {"alpha": 2}), 3 * x)


def test_other_types_of_numbers_are_left_to_torch():
    whole = torch.ones(2, 3, dtype=torch.long, device="meta")
    assert compute(ATEN.add.Tensor, (whole, vector(3)), {}).dtype is torch.float64
    assert compute(ATEN.div.Tensor, (whole, 2), {}).dtype is torch.float32


@pytest.mark.parametrize(
    ("func", "args", "error"),
    [
        (ATEN.addmm.default, (vector(7), image(5, 3), image(4, 7)), "reduction dim|multiplied"),
        (ATEN.add.Tensor, (image(2, 3, 4), vector(3)), "broadcast"),
        (ATEN.native_layer_norm.default, (image(2, 5, 6), [5], vector(5), None, 1e-6), "normalized_shape"),
    ],
)
def test_wrong_shapes_get_the_error_of_torch(func, args, error):
    with pytest.raises(RuntimeError, match=error):
        compute(func, args, {})
