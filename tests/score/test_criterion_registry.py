import pytest

from hf_prune.errors import CriterionError, HfPruneError
from hf_prune.score.base import Criterion
from hf_prune.score.registry import CRITERIA, criterion
from hf_prune.score.taylor import Taylor


@pytest.mark.parametrize("name", CRITERIA)
def test_every_name_is_a_file_with_a_criterion_of_that_name(name):
    found = criterion(name)
    assert isinstance(found, Criterion)
    assert found.name == name
    assert type(found).__module__ == f"hf_prune.score.{name}"


def test_instance_is_returned_as_it_is():
    mine = Taylor(form="elements")
    assert criterion(mine) is mine


def test_unknown_name_is_an_error_with_all_names_and_the_nearest():
    with pytest.raises(CriterionError, match=r"magnitude, random.*got 'tailor'; did you mean taylor"):
        criterion("tailor")
    assert issubclass(CriterionError, HfPruneError)
    assert issubclass(CriterionError, ValueError)


def test_capital_letters_are_forgiven_in_the_hint():
    with pytest.raises(CriterionError, match="did you mean fpgm"):
        criterion("FPGM")


def test_class_instead_of_instance_is_an_error():
    with pytest.raises(CriterionError, match=r"write Taylor\(\)"):
        criterion(Taylor)


@pytest.mark.parametrize("value", [None, 3])
def test_nonsense_is_an_error(value):
    with pytest.raises(CriterionError, match="must be one of"):
        criterion(value)
