"""Signals looked up from tokens, against plain numpy in float64; what is kept, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from colm_ds.config.colm import CoLMSection
from colm_ds.config.resolve import resolve_config
from colm_ds.engine.coreset_selector import CoresetSelector
from colm_ds.errors import ConfigError, ProbeError
from colm_ds.probe.tokens import (
    WIDTH,
    TokensEstimator,
    counted_tokens,
    digest,
    example_features,
    random_vectors,
    token_vectors,
    vectors_of_model,
)
from colm_ds.randomness import private_generator
from colm_ds.selection import SINGLE_PROCESS
from colm_ds.types import Candidates, Example
from tests.engine.training import SOURCES, records
from tests.selection.oracles import randn
from tests.tiny_models import VOCABULARY_SIZE, tiny_model

SECTION = {"large_batch_size": 24, "coreset_size": 12, "seed": 3, "probe": {"estimator": "tokens"}}


def examples(count: int = 24) -> list[Example]:
    made = records(SOURCES)[:count]
    return [
        Example(torch.tensor(one["input_ids"]), torch.tensor(one["labels"]), 0, index) for index, one in enumerate(made)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_standardised_and_projected(dtype: torch.dtype) -> None:
    embedding = (randn(50, 20, seed=1) * torch.arange(1, 21) + 3).to(dtype)
    embedding[:, 7] = 2.5  # constant: becomes 0
    found = token_vectors(embedding, seed=5, width=16)
    plain = embedding.double().numpy()
    deviation = plain.std(axis=0)
    standard = np.where(deviation > 0, (plain - plain.mean(axis=0)) / np.where(deviation > 0, deviation, 1), 0)
    generator = private_generator(5, "token vectors")
    directions = torch.randn(20, 16, generator=generator, dtype=torch.float64).numpy() / 4.0
    assert found.dtype == torch.float32
    assert torch.equal(found, found.half().float())
    np.testing.assert_allclose(found.numpy(), standard @ directions, rtol=1e-3, atol=1e-6)


def test_projection_keeps_distances() -> None:
    embedding = randn(200, 300, seed=2)
    found = token_vectors(embedding, seed=0, width=128)
    plain = (embedding - embedding.mean(dim=0)) / embedding.std(dim=0, correction=0)
    ratio = torch.cdist(found, found).square()[0, 1:] / torch.cdist(plain, plain).square()[0, 1:]
    assert 0.8 < float(ratio.mean()) < 1.2
    assert float(ratio.std()) < 0.2


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_features_against_numpy(power: float) -> None:
    vectors = randn(VOCABULARY_SIZE, 9, seed=3)
    made = examples(8)
    found = example_features(made, vectors, power)
    for row, example in zip(found.numpy(), made, strict=True):
        tokens = [label for label in example.labels.tolist()[1:] if label != -100]
        wanted = vectors.double().numpy()[tokens].mean(axis=0) / len(tokens) ** power
        np.testing.assert_allclose(row, wanted, rtol=2**-10, atol=1e-6)  # means are kept in float16


def test_classification_looks_at_prompt_and_right_candidate() -> None:
    ids = torch.tensor([5, 6, 7, 5, 6, 8, 9])
    labels = torch.tensor([-100, -100, 7, -100, -100, 8, 9])
    example = Example(ids, labels, 0, 0, Candidates((3, 4), 1))
    assert counted_tokens(example).tolist() == [5, 6, 8, 9]
    vectors = randn(20, 4, seed=4)
    wanted = vectors[[5, 6, 8, 9]].double().mean(dim=0).half().float()
    torch.testing.assert_close(example_features([example], vectors, 0.5)[0], wanted)  # T is 1


def test_a_token_without_a_vector() -> None:
    example = Example(torch.tensor([1, 30]), torch.tensor([-100, 30]), 0, 7)
    with pytest.raises(ProbeError, match="example 7: token id 30, and the model knows 20 tokens"):
        example_features([example], randn(20, 4, seed=4), 0.5)


def test_a_model_without_embeddings_has_random_vectors() -> None:
    class Bare(torch.nn.Module):
        config = type("Config", (), {"vocab_size": 11})()

    found = vectors_of_model(Bare(), 3, SINGLE_PROCESS)
    assert torch.equal(found, random_vectors(11, 3))
    assert found.shape == (11, WIDTH)


def test_vectors_stay_those_of_the_start() -> None:
    model = tiny_model("llama")
    before = vectors_of_model(model, 3, SINGLE_PROCESS)
    kept = TokensEstimator(before, 0.5)
    state = kept.state_dict()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1.0
    resumed = TokensEstimator(vectors_of_model(model, 3, SINGLE_PROCESS), 0.5)
    assert resumed.state_dict()["digest"] != state["digest"]
    resumed.load_state_dict(state)
    assert torch.equal(resumed.state_dict()["vectors"], before)
    with pytest.raises(ProbeError, match="not what their digest says"):
        resumed.load_state_dict(state | {"digest": "other"})
    shorter = before[:5].contiguous()
    with pytest.raises(ProbeError, match="of 5 tokens, the model has 97"):
        resumed.load_state_dict({"vectors": shorter, "digest": digest(shorter)})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_architecture_and_no_pass_of_the_model(family: str) -> None:
    """The choice is that of the features alone, in one pool; a selection never calls the model."""
    model = tiny_model(family)
    called: list[int] = []
    made = examples()
    selector = CoresetSelector(model, SECTION, ["a"])  # checks once that the model is causal, by two passes
    model.register_forward_pre_hook(lambda *_: called.append(1))
    selection = selector(made)
    assert not called
    assert len(selection.probed) == 0
    assert selection.coreset.size == 12
    assert selection.coreset.coherence == {}
    features = example_features(made, vectors_of_model(model, 3, SINGLE_PROCESS), 0.5)
    error = [
        float(((weights[:, None] * features[selection.positions]).mean(dim=0) - features.mean(dim=0)).norm())
        for weights in (selection.weights, torch.ones(12))
    ]
    assert error[0] < 0.7 * error[1]


def test_defaults_fit_the_estimator_and_written_keys_win() -> None:
    found = CoLMSection.model_validate(SECTION)
    assert (found.per_source, found.small_sources, found.geometry) == (False, "none", "plain")
    assert (found.selector, found.metric, found.weights) == ("importance", "euclidean", "uniform")
    paper, pinned = CoLMSection.model_validate(SECTION | {"preset": "paper"}), {"preset", "quotas", "small_share"}
    assert paper.model_dump(exclude=pinned) == found.model_dump(exclude=pinned)
    medoids = CoLMSection.model_validate(SECTION | {"preset": "paper", "selector": "colm", "metric": "cosine"})
    assert (medoids.metric, medoids.weights, medoids.per_source) == ("cosine", "matched", False)
    assert CoLMSection.model_validate(paper.model_dump()) == paper


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("colm.mask", {"mask": {"size": 3}}),
        ("colm.replay", {"replay": "on"}),
        ("colm.geometry", {"geometry": "adam"}),
        ("colm.probe.layer", {"probe": {"estimator": "tokens", "layer": "fc"}}),
        ("colm.probe.num_probes", {"probe": {"estimator": "tokens", "num_probes": 4}}),
        ("colm.probe.refresh", {"probe": {"estimator": "tokens", "refresh": "run"}}),
        ("colm.probe.sample", {"probe": {"estimator": "tokens", "sample": 0.5}}),
        ("colm.probe.token_sample", {"probe": {"estimator": "tokens", "token_sample": 0.5}}),
    ],
)
def test_keys_without_meaning_are_refused(key: str, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=key):
        resolve_config({"colm": SECTION | changes}, 1)
