import torch

from hf_prune.tokens.reducers.package import package_dropped
from hf_prune.tokens.tokenset import TokenSet


def state(alive, packages_alive=None):
    alive = torch.tensor(alive)
    packages = torch.zeros(len(alive), 0) if packages_alive is None else torch.tensor(packages_alive)
    return TokenSet(alive.shape[1], alive, packages)


def test_the_package_is_the_keep_probability_weighted_average_of_the_newly_dropped():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [4.0, 4.0], [9.0, 9.0]]])
    probability = torch.tensor([[0.3, 0.1, 0.9, 0.5]])
    before = state([[1.0, 1.0, 1.0, 0.0]])
    package, alive = package_dropped(
        tokens, before, torch.tensor([[0.0, 0.0, 1.0, 0.0]]), probability, packages="single"
    )
    torch.testing.assert_close(package, torch.tensor([[[0.75, 0.25]]]))  # (0.3 * a + 0.1 * b) / 0.4
    assert alive.tolist() == [[1.0]]


def test_the_single_package_re_absorbs_the_one_before_with_its_own_probability():
    tokens = torch.tensor([[[2.0], [8.0], [5.0]]])  # two patches, then the old package
    before = state([[1.0, 1.0]], [[1.0]])
    package, alive = package_dropped(
        tokens, before, torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.9, 0.6]]), packages="single"
    )
    torch.testing.assert_close(package, torch.tensor([[[(0.2 * 2 + 0.6 * 5) / 0.8]]]))
    assert alive.tolist() == [[1.0]]


def test_with_nothing_newly_dropped_the_old_package_stays_itself():
    tokens = torch.tensor([[[2.0], [8.0], [5.0]]])
    before = state([[1.0, 1.0]], [[1.0]])
    package, alive = package_dropped(tokens, before, torch.ones(1, 2), torch.rand(1, 3), packages="single")
    torch.testing.assert_close(package, torch.tensor([[[5.0]]]))
    assert alive.tolist() == [[1.0]]


def test_an_image_that_dropped_nothing_has_no_package():
    tokens = torch.randn(2, 3, 4)
    after = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    package, alive = package_dropped(tokens, state([[1.0] * 3] * 2), after, torch.rand(2, 3), packages="single")
    assert alive.tolist() == [[0.0], [1.0]]
    assert torch.isfinite(package).all()


def test_worthless_tokens_are_packaged_as_their_plain_mean():
    tokens = torch.tensor([[[1.0], [3.0]]])
    package, _ = package_dropped(
        tokens, state([[1.0, 1.0]]), torch.zeros(1, 2), torch.tensor([[1e-30, 0.0]]), packages="single"
    )
    torch.testing.assert_close(package, torch.tensor([[[2.0]]]))


def test_per_stage_packages_are_appended_and_never_change():
    tokens = torch.tensor([[[2.0], [8.0], [5.0]]])
    before = state([[1.0, 1.0]], [[1.0]])
    package, alive = package_dropped(
        tokens, before, torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.9, 0.6]]), packages="per_stage"
    )
    torch.testing.assert_close(package, torch.tensor([[[5.0], [2.0]]]))
    assert alive.tolist() == [[1.0, 1.0]]


def test_gradients_reach_decisions_probabilities_and_tokens():
    tokens = torch.randn(1, 3, 4, requires_grad=True)
    after = torch.tensor([[0.0, 1.0, 0.0]], requires_grad=True)
    probability = torch.tensor([[0.3, 0.5, 0.6]], requires_grad=True)
    package, _ = package_dropped(tokens, state([[1.0] * 3]), after, probability, packages="single")
    package.square().sum().backward()
    assert after.grad.abs().sum() > 0
    assert probability.grad[0, [0, 2]].abs().min() > 0
    assert tokens.grad[0, 1].abs().sum() == 0  # a kept token is not in the package


def test_without_packages_nothing_is_appended():
    package, alive = package_dropped(
        torch.randn(1, 2, 3), state([[1.0, 1.0]]), torch.zeros(1, 2), torch.rand(1, 2), packages="none"
    )
    assert package.shape == (1, 0, 3)
    assert alive.shape == (1, 0)
