import pytest
import torch
import torch.nn.functional as F
from tiny_models import build_dense, build_pruned, pixel_batch

from hf_prune.recover.distill import DistillWeights, distillation_loss, final_tokens, teach
from hf_prune.tokens.site import logits_of

ONLY = {
    name: dict.fromkeys(("labels", "logits", "tokens"), 0.0) | {name: 1.0} for name in ("labels", "logits", "tokens")
}


def loss(term: str, student_tokens, teacher_tokens, keep, logits=None, teacher_logits=None, **extra):
    logits = torch.randn(2, 3) if logits is None else logits
    return distillation_loss(
        logits,
        student_tokens,
        logits if teacher_logits is None else teacher_logits,
        teacher_tokens,
        torch.tensor([0, 2]),
        keep,
        weights=DistillWeights(**ONLY[term]),
        **extra,
    ).item()


def test_only_surviving_patches_are_compared_with_the_teacher():
    teacher, student = torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)
    keep = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    student[:, 1] = 100.0
    student[1, 2] = 100.0
    assert loss("tokens", student, teacher, keep) == 0.0
    student[0, 0] = 3.0
    assert loss("tokens", student, teacher, keep) == pytest.approx(9.0 / 3)  # mean over three survivors


def test_the_logit_term_is_the_divergence_from_the_teacher():
    logits, teacher_logits = torch.randn(2, 3), torch.randn(2, 3)
    tokens, keep = torch.zeros(2, 3, 4), torch.ones(2, 3)
    p, log_q = teacher_logits.softmax(-1), logits.log_softmax(-1)
    expected = (p * (p.log() - log_q)).sum(-1).mean().item()
    got = loss("logits", tokens, tokens, keep, logits, teacher_logits)
    assert got == pytest.approx(expected, rel=1e-5)
    assert loss("logits", tokens, tokens, keep) == pytest.approx(0.0, abs=1e-6)


def test_the_label_term_is_cross_entropy():
    logits = torch.randn(2, 3)
    tokens, keep = torch.zeros(2, 3, 4), torch.ones(2, 3)
    expected = F.cross_entropy(logits, torch.tensor([0, 2]), label_smoothing=0.1).item()
    got = loss("labels", tokens, tokens, keep, logits, label_smoothing=0.1)
    assert got == pytest.approx(expected, rel=1e-6)


def test_teacher_and_student_tokens_stand_at_the_same_places(kind):
    model = build_dense(kind)
    teacher_logits, teacher_tokens = teach(model, pixel_batch(2))
    assert not teacher_logits.requires_grad
    pruning = build_pruned(model)
    for selector in pruning.selectors.values():
        selector.keep_threshold.fill_(-1e9)
    for runtime in ("masked", "gathered", "packed"):
        pruning.runtime = runtime
        with torch.no_grad(), final_tokens(model) as tokens:
            logits_of(model(pixel_batch(2)))
        patches = pruning.patches_on_grid(tokens[0])
        places = slice(pruning.num_prefix_tokens, pruning.num_prefix_tokens + patches.shape[1])
        torch.testing.assert_close(patches, teacher_tokens[:, places], atol=1e-4, rtol=0)
