import pytest
import torch

from hf_prune.errors import CriterionError
from hf_prune.score.activation import Activation
from hf_prune.score.fisher import Fisher
from hf_prune.score.registry import CRITERIA, criterion
from hf_prune.score.taylor import Taylor

# Images that the model sees at a time, where those are not the batch.
AT_A_TIME = {"fisher": 1, "grasp": 16}
NEEDY = [name for name in CRITERIA if criterion(name).needs != "none"]


def test_some_criteria_need_data():
    assert NEEDY == ["activation", "fisher", "fluctuation", "force", "grasp", "snip", "taylor"]


@pytest.mark.parametrize("name", NEEDY)
def test_missing_data_are_an_error_that_says_what_to_pass(name, convnet):
    with pytest.raises(CriterionError, match=f"'{name}' must look at data, got none; pass `data`.*pixel_values"):
        criterion(name).score(convnet.model, convnet.graph, convnet.axes, None)


@pytest.mark.parametrize("name", NEEDY)
def test_empty_data_are_an_error(name, convnet):
    with pytest.raises(CriterionError, match="at least one image"):
        criterion(name).score(convnet.model, convnet.graph, convnet.axes, [])


@pytest.mark.parametrize("name", NEEDY)
@pytest.mark.parametrize("batch", [{"image": torch.zeros(1)}, [1, 2], "text", 3, {"pixel_values": [1]}])
def test_batches_of_another_form_are_an_error(name, batch, convnet):
    with pytest.raises(CriterionError, match="batches must be dicts with `pixel_values`"):
        convnet.score(criterion(name), data=[batch])


@pytest.mark.parametrize("name", NEEDY)
def test_pairs_do_as_well_as_dicts(name, convnet):
    pairs = [(batch["pixel_values"], batch["labels"]) for batch in convnet.data]
    scores = convnet.score(criterion(name))
    for axis, values in convnet.score(criterion(name), data=pairs).items():
        assert torch.equal(values, scores[axis])


@pytest.mark.parametrize("name", NEEDY)
def test_data_are_streamed(name, convnet):
    """No batch is asked for before the one before it was used, and none twice."""
    runs = []
    handle = convnet.model.register_forward_pre_hook(lambda *_: runs.append("run"))

    def stream():
        for batch in convnet.data:
            runs.append("read")
            yield batch

    convnet.score(criterion(name), data=stream())
    handle.remove()
    assert runs[0] == "read"
    assert runs.count("read") == len(convnet.data)
    assert runs[1 + 32 // AT_A_TIME.get(name, 32)] == "read"


@pytest.mark.parametrize("name", NEEDY)
def test_unreadable_images_are_left_out(name, convnet):
    batch = convnet.data[0]
    marked = {"pixel_values": batch["pixel_values"].clone(), "labels": batch["labels"].clone(), "unreadable": None}
    marked["labels"][::2] = -100
    marked["pixel_values"][::2] = 100.0
    half = {"pixel_values": batch["pixel_values"][1::2], "labels": batch["labels"][1::2]}
    none = {"pixel_values": batch["pixel_values"], "labels": torch.full_like(batch["labels"], -100)}
    scores = convnet.score(criterion(name), data=[half])
    for axis, values in convnet.score(criterion(name), data=[marked, none]).items():
        torch.testing.assert_close(values, scores[axis])


def test_only_a_loss_needs_labels(convnet):
    data = [{"pixel_values": batch["pixel_values"]} for batch in convnet.data]
    assert convnet.score(Activation(), data=data)
    for rule in (Taylor(), Fisher()):
        with pytest.raises(CriterionError, match="needs labels"):
            convnet.score(rule, data=data)


def test_labels_must_be_as_many_as_images(convnet):
    with pytest.raises(CriterionError, match="32 images and 5 labels"):
        convnet.score(Taylor(), data=[(convnet.data[0]["pixel_values"], torch.zeros(5, dtype=torch.long))])


def test_infinite_loss_is_an_error(convnet):
    images = torch.full((2, 1, 8, 8), float("inf"))
    with pytest.raises(CriterionError, match="the loss must be finite, got nan"):
        convnet.score(Taylor(), data=[(images, torch.tensor([0, 1]))])


def test_gradients_work_where_they_are_switched_off(convnet):
    expected = convnet.score(Taylor())
    with torch.no_grad():
        scores = convnet.score(Taylor())
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", CRITERIA)
def test_half_precision_models_are_scored(name, convnet):
    expected = convnet.score(criterion(name))
    convnet.model.to(torch.bfloat16)
    for axis, values in convnet.score(criterion(name)).items():
        assert values.dtype == torch.float32
        # Steps go on from what they did before, and so from each other's differences.
        least = 0.85 if name == "force" else 0.95
        assert torch.corrcoef(torch.stack([values, expected[axis]]))[0, 1] > least
