"""The table of architectures: each is found by its configuration and by what Hugging Face calls it."""

from __future__ import annotations

import pytest

from megamult.config import SECTIONS
from megamult.models.architectures import ARCHITECTURES, architecture_of, architecture_of_hugging_face


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_found_by_its_configuration_and_by_its_own_config_json(name: str) -> None:
    architecture = ARCHITECTURES[name]
    sizes = architecture.sizes()
    assert architecture_of(sizes) is architecture
    described = architecture.to_hugging_face(sizes, 500, tied=False, dtype="float32", token_ids={})
    assert architecture_of_hugging_face(described) is architecture


def test_the_section_model_of_a_run_is_the_configuration_of_an_architecture() -> None:
    assert SECTIONS["model"] in {architecture.sizes for architecture in ARCHITECTURES.values()}


def test_sizes_of_no_architecture_are_named_with_those_that_there_are() -> None:
    with pytest.raises(TypeError, match="of the type dict, which belongs to no architecture: use one of ModelConfig"):
        architecture_of({})


@pytest.mark.parametrize("described", [{"model_type": "gemma"}, {"model_type": ["llama"]}, {}])
def test_another_model_type_is_named_with_those_that_there_are(described: dict[str, object]) -> None:
    message = f"model_type is {described.get('model_type')!r}, not 'llama'".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=message):
        architecture_of_hugging_face(described)
