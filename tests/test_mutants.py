"""The mutation list stays applicable, and a sample of it is noticed (all of it with --slow, or by `python tests/mutants.py`)."""

import ast
from pathlib import Path

import mutants
import pytest
from mutations import Mutation

EVERY = -(-len(mutants.MUTATIONS) // 3)


@pytest.mark.parametrize("mutation", mutants.MUTATIONS, ids=lambda m: m.name)
def test_applies(mutation: Mutation) -> None:
    text = mutants.mutated(mutation)
    assert text != (mutants.ROOT / mutation.file).read_text()
    if mutation.file.endswith(".py"):
        ast.parse(text)


def test_the_list() -> None:
    names = [mutation.name for mutation in mutants.MUTATIONS]
    assert len(names) == len(set(names)) >= 60
    named = {part for mutation in mutants.MUTATIONS for part in mutation.tests.replace(";", " ").split() if part.startswith("test_")}
    assert {name for name in named if not (mutants.ROOT / "tests" / name).exists()} == set()
    assert {mutation.file for mutation in mutants.MUTATIONS} >= {
        str(path.relative_to(mutants.ROOT)) for path in (mutants.ROOT / "fused_kopt/optimizers").glob("[a-q]*.py")
    }


def test_text_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LookupError):
        mutants.mutated(mutants.MUTATIONS[0]._replace(old="nowhere"))
    with pytest.raises(LookupError):
        mutants.mutated(mutants.MUTATIONS[0]._replace(where="nobody"))


@pytest.mark.parametrize(
    ("new", "killer"), [('__version__ = "0"', "test_structure.py::test_one_version"), ('__version__ = "0.1.0"  #', None)]
)
def test_the_copy_is_what_runs(new: str, killer: str | None) -> None:
    mutation = Mutation("version", "test_structure.py -k one_version", "fused_kopt/__init__.py", "", '__version__ = "0.1.0"', new)
    assert mutants.attempt(mutation, thorough=False).killer == killer


@pytest.mark.slow(every=EVERY)
@pytest.mark.parametrize("mutation", mutants.MUTATIONS, ids=lambda m: m.name)
def test_noticed(mutation: Mutation) -> None:
    assert mutants.attempt(mutation, thorough=False).killer
