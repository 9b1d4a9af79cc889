"""What is known before training about a model and its data: ids, positions, and who sees whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from colm_ds.batching.row_facts import facts_of_dataset
from colm_ds.errors import ConfigError
from colm_ds.models.model_fit import check_model_fits, is_causal
from colm_ds.types import Example
from tests.tiny_models import tiny_model


class Rows:
    """A dataset of given token ids."""

    def __init__(self, rows: list[list[int]], flat: bool = False) -> None:
        self.rows = [torch.tensor(row) for row in rows]
        self.lengths = self.num_label_tokens = np.array([len(row) for row in rows])
        if flat:
            self.tokens = np.concatenate([row.numpy() for row in self.rows])
            self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return Example(index=index, source=0, input_ids=self.rows[index], labels=self.rows[index])


def tiny(kind: str, **values: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).eval()


@pytest.mark.parametrize("flat", [False, True])
def test_the_largest_id_is_found(flat: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 90, (5 + index % 7,), generator=generator).tolist() for index in range(40)]
    rows[23][2] = 91
    assert facts_of_dataset(Rows(rows, flat)).largest_id == (23, 91)


def test_ids_beyond_the_embeddings_are_refused() -> None:
    model = tiny_model("llama")
    last = model.config.vocab_size - 1
    check_model_fits(model, Rows([[1, 2, last]]))
    with pytest.raises(ConfigError, match=rf"token id = {last + 1}: in example 1, .* embeddings for {last + 1} ids"):
        check_model_fits(model, Rows([[1, 2, 3], [4, last + 1, 5]]))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 12, "vocab_size": 97}),
        (
            "opt",
            {
                "hidden_size": 32,
                "ffn_dim": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "max_position_embeddings": 12,
                "vocab_size": 97,
                "word_embed_proj_dim": 32,
            },
        ),
    ],
)
def test_examples_beyond_learned_positions_are_refused(kind: str, values: dict[str, Any]) -> None:
    model = tiny(kind, **values)
    check_model_fits(model, Rows([list(range(1, 13))]))
    model(input_ids=torch.arange(1, 13)[None])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.arange(1, 14)[None])
    with pytest.raises(ConfigError, match=r"length = 13: of example 1 .* learned 12 positions"):
        check_model_fits(model, Rows([[1, 2], list(range(1, 14))]))


def test_computed_positions_have_no_end() -> None:
    model = tiny_model("llama")
    length = model.config.max_position_embeddings + 8
    check_model_fits(model, Rows([[1 + index % 50 for index in range(length)]]))


@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "mistral"])
def test_causal_models_are_causal(family: str) -> None:
    model = tiny_model(family)
    was_training = model.training
    assert is_causal(model) is True
    assert model.training == was_training


def test_encoders_are_not() -> None:
    values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = tiny("bert", vocab_size=97, **values)
    assert is_causal(bert) is False
    with pytest.raises(ConfigError, match="model type = 'bert': a token sees later ones"):
        check_model_fits(bert, Rows([[1, 2, 3]]))
    assert is_causal(tiny("bert", vocab_size=97, is_decoder=True, **values)) is True
    t5 = AutoConfig.for_model("t5", vocab_size=97, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
    assert is_causal(AutoModel.from_config(t5)) is False


def test_a_model_that_does_not_say_is_let_through() -> None:
    assert is_causal(torch.nn.Linear(3, 3)) is None
    check_model_fits(torch.nn.Linear(3, 3), Rows([[1, 2, 3]]))
