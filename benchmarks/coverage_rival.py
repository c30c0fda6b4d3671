"""What Torch-Pruning does with one model, set up as well as a program can.

It is told the output layers (found by walking back from the outputs), the number of heads of every attention layer that
can be recognised, and gets the integers of those layers corrected afterwards, as its examples do by hand. Models with
attention are tried twice, with narrower heads and with fewer heads; the better result is taken.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch_pruning as tp  # pyright: ignore[reportMissingImports]  (only needed for the comparison)
import torchvision
from coverage_models import build
from coverage_ours import KEEP, Dense, counts, run
from torch import nn

# Which of its next functions leads to the weight.
WEIGHT_OF = {"ConvolutionBackward0": 1, "AddmmBackward0": 2, "MmBackward0": 1}
PROJECTIONS = {
    "qkv": 3, "kv": 2, "q": 1, "k": 1, "v": 1, "query": 1, "key": 1, "value": 1, "q_proj": 1, "k_proj": 1, "v_proj": 1,
    "to_q": 1, "to_k": 1, "to_v": 1, "qkv_proj": 3, "query_key_value": 3, "in_proj": 3,
}  # fmt: skip
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "nh")
WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head", "key_dim")
TOTALS = ("attn_dim", "all_head_size", "embed_dim", "inner_dim", "hidden_size")


def measure_rival(name: str, model: nn.Module, inputs: Any, record: dict[str, Any]) -> None:
    """Try every way to set it up and fill in the best result."""
    dense, ways = Dense(model, inputs), [False, True] if list(attentions(model)) else [False]
    tries: list[dict[str, Any]] = []
    for fewer_heads in ways:
        result: dict[str, Any] = {"fewer_heads": fewer_heads}
        tries.append(result)
        try:
            halve(model, inputs, fewer_heads=fewer_heads, record=result)
            dense.judge(model, inputs, result)
        except Exception as err:
            result["error"] = f"{type(err).__name__}: {(str(err).strip() or '-').splitlines()[0][:300]}"
        result["counts"] = counts(result)
        if result["counts"]:
            break
        model, inputs = build(name)
    record |= max(tries, key=lambda result: (result["counts"], result.get("backward", False), result.get("gone", 0)))


def halve(model: nn.Module, inputs: Any, *, fewer_heads: bool, record: dict[str, Any]) -> None:
    """Prune half of every group in place."""
    started = time.perf_counter()
    known: dict[nn.Module, int] = {layer: count for _, count, layers in attentions(model) for layer, _ in layers}
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.MagnitudeImportance(),
        global_pruning=False,
        pruning_ratio=1 - KEEP,
        ignored_layers=list(output_layers(model, inputs)),
        round_to=None,  # pyright: ignore[reportArgumentType]
        num_heads=known,
        in_channel_groups={},
        out_channel_groups={},
        prune_num_heads=fewer_heads,
        prune_head_dims=not fewer_heads,
        head_pruning_ratio=1 - KEEP if fewer_heads else 0.0,
        forward_fn=lambda module, example: run(module, example),
    )
    record["analyse_s"], record["traced"] = round(time.perf_counter() - started, 2), True
    pruner.step()
    correct_integers(model, pruner.num_heads)
    # It has no verification of its own: what runs is taken as right.
    record["pruned"] = record["verified"] = True
    record["prune_s"] = round(time.perf_counter() - started, 2)


def output_layers(model: nn.Module, inputs: Any) -> set[nn.Module]:
    """Return the layers between which and the outputs there is no further layer."""
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False) if p.ndim > 1}
    stack = [out.grad_fn for out in run(model, inputs) if out.grad_fn is not None]
    seen, found = set(stack), set()
    while stack:
        node: Any = stack.pop()
        position = WEIGHT_OF.get(node.name())
        owner = None if position is None else _owner(node.next_functions[position][0], owners)
        if owner is not None:
            found.add(owner)
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def _owner(node: Any, owners: dict[int, nn.Module], depth: int = 6) -> nn.Module | None:
    """Return the module whose weight is used, perhaps transposed or standardised."""
    if node is None or depth == 0:
        return None
    if hasattr(node, "variable"):
        return owners.get(id(node.variable))
    return next((o for f, _ in node.next_functions if (o := _owner(f, owners, depth - 1)) is not None), None)


def attentions(model: nn.Module) -> Iterator[tuple[nn.Module, int, list[tuple[nn.Linear, int]]]]:
    """Yield modules with a number of heads, that number, and their projections with how many results each holds."""
    for module in model.modules():
        count = next((v for name in COUNTS if type(v := getattr(module, name, None)) is int), 0)
        layers = [
            (layer, PROJECTIONS[name])
            for name, layer in module.named_children()
            if name in PROJECTIONS and isinstance(layer, nn.Linear)
        ]
        if count > 1 and layers and all(layer.out_features % count == 0 for layer, _ in layers):
            yield module, count, layers


def correct_integers(model: nn.Module, num_heads: dict[nn.Module, int]) -> None:
    """Set what attention modules say of their heads to what is left of them."""
    if isinstance(model, torchvision.models.VisionTransformer):
        model.hidden_dim = model.class_token.shape[-1]
    for module in model.modules():
        named = [(name, layer) for name, layer in module.named_children() if layer in num_heads and name in PROJECTIONS]
        if not named:
            continue
        name, layer = named[0]
        count, total = num_heads[layer], layer.get_parameter("weight").shape[0] // PROJECTIONS[name]
        for names, value in ((COUNTS, count), (WIDTHS, total // count), (TOTALS, total)):
            for attribute in names:
                if type(getattr(module, attribute, None)) is int:
                    setattr(module, attribute, value)
