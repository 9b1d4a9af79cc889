"""The plan of classification and pretraining recipes: against counted allocations, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from colm_ds.batching.micro_batch import MicroBatch, make_micro_batch
from colm_ds.cli import main
from colm_ds.data.choices import WRITERS
from colm_ds.data.pretraining.token_store import MANIFEST
from colm_ds.errors import ConfigError
from colm_ds.memory.counted import counted_allocations
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.planner.choice_rows import CANDIDATE_TOKENS, choice_micro_batch, num_rows
from colm_ds.planner.job import Job, job_of_recipe
from colm_ds.planner.plan import Planner
from colm_ds.planner.plan_report import accumulation_steps
from colm_ds.planner.step_cost import step_cost
from colm_ds.planner.suggestions import list_changes
from colm_ds.recipes.model import add_lora
from colm_ds.recipes.recipe import load_recipe
from colm_ds.types import Candidates, Example

SMALL = (
    "model.config={model_type: llama, hidden_size: 128, intermediate_size: 320, num_hidden_layers: 4, vocab_size: 5000,"
    " num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256, tie_word_embeddings: false}"
)
CHOICES = (
    "tokenizer=none/here",
    "model.name_or_path=null",
    "model.gguf_file=null",
    SMALL,
    "data.max_length=96",
    "micro_batch_size=4",
)


def job_of(path: Path, *overrides: str, world_size: int = 1, **options: Any) -> Job:
    """A recipe's job on this CPU."""
    recipe = load_recipe(path, overrides, needs_files=False)
    return job_of_recipe(recipe, world_size, on_gpu=False, **options)


def test_the_schedule_counts_in_the_price(repo_root: Path) -> None:
    """A step that chooses is dearer than a plain one; what a run costs lies between by their shares."""
    recipe = repo_root / "finetune/recipes/smollm2_math.yaml"
    planner = Planner()

    def forwards(*overrides: str) -> float:
        job = job_of(recipe, "steps=40", "model.activation_checkpointing=false", *overrides)
        return step_cost(job, planner.tracer(job.spec).parameters, None).forwards

    always, never = forwards(), forwards("colm.schedule.start_step=40")
    assert forwards("colm.selector=random") == pytest.approx(never)
    assert always > never
    for schedule, share in (
        ("{every: 4}", 0.25),
        ("{start_step: 10}", 0.75),
        ("{end_step: 10, plain_every: 2}", 0.125),
    ):
        assert forwards(f"colm.schedule={schedule}") == pytest.approx(share * always + (1 - share) * never)


def test_settings_are_those_of_training(repo_root: Path, tmp_path: Path) -> None:
    """What "auto" becomes, PyTorch's Adam where the recipe asks for it, and as few examples as tokens allow."""
    recipe = repo_root / "finetune/recipes/smollm2_math.yaml"
    section = "deepspeed={zero_optimization: {stage: 2, reduce_bucket_size: auto}}"
    auto = job_of(recipe, section)
    assert auto.zero.reduce_bucket == int(auto.spec.config.hidden_size) ** 2
    assert auto.bucket_key == "deepspeed.zero_optimization.reduce_bucket_size"
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert job_of(recipe, f"deepspeed={tmp_path}/ds.json").bucket_key.startswith(f"{tmp_path}/ds.json: zero_opt")
    read = load_recipe(recipe, ["optimizer.torch_adam=true"], needs_files=False)
    assert job_of_recipe(read, 1, on_gpu=True).zero.adam_temporaries == 1
    few = job_of(recipe, "micro_batch_size=8", "data.max_length=128", "colm.micro_batch_tokens=300")
    assert few.training_rows(few.micro_batch).count == 2
    assert "micro_batch_size=1" in [change.override for change in list_changes(Planner(), few)]
    assert accumulation_steps(few) == math.ceil(few.rows_of_step / 2)


def test_gpus_are_planned_in_their_precision(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dtype: auto` is bfloat16 in a plan, though this machine may compute in float32."""
    monkeypatch.setattr("colm_ds.recipes.sections.native_dtype", lambda: "float32")
    words = ["plan", str(repo_root / "finetune/recipes/smollm2_math.yaml"), "--num-gpus", "1", "--json"]
    states = {}
    for dtype in ("auto", "bfloat16", "float32"):
        assert main([*words, f"model.dtype={dtype}"]) == 0
        states[dtype] = next(iter(json.loads(capsys.readouterr().out)["arms"].values()))["peak_gib"]
    assert states["auto"] == states["bfloat16"] < states["float32"]


def test_adapters_in_some_layers_are_refused_in_their_words(repo_root: Path) -> None:
    job = job_of(repo_root / "finetune/recipes/smollm2_math.yaml", "lora.layers_to_transform=[20, 29]")
    with pytest.raises(ConfigError, match=r"lora\.layers_to_transform = \[20, 29\]: adapters in some of the layers"):
        Planner().memory(job)


def choice_job(repo_root: Path, task: str, *overrides: str, **options: Any) -> Job:
    recipe = repo_root / "finetune/recipes/smollm2_choices.yaml"
    return job_of(recipe, *CHOICES, f"data.task={task}", *overrides, **options)


def pretraining_job(repo_root: Path, *overrides: str, **options: Any) -> Job:
    return job_of(repo_root / "pretrain/recipes/cpu_pile5.yaml", *overrides, **options)


def choice_example(job: Job) -> Example:
    """One of the job's longest examples, its candidates different from the first token on."""
    size = max(job.candidates)
    parts = [torch.cat([torch.zeros(job.length - size), torch.full((n,), 3.0 + n)]) for n in job.candidates]
    parts = [part.long() + place * (part > 0) for place, part in enumerate(parts)]
    labels = [torch.where(part > 0, part, -100) for part in parts]
    return Example(torch.cat(parts), torch.cat(labels), 0, 0, Candidates(tuple(map(len, parts)), 0))


def counted_peak(job: Job, batch: MicroBatch) -> int:
    """Allocations of forward and backward of a real model, counted while gradients are there."""
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(job.spec.config), dtype=job.spec.dtype)
    model = add_lora(model, job.spec.lora) if job.spec.lora else model
    model.train()

    def step() -> None:
        example_loss_sums(model, find_loss_head(model), batch).sum().backward()

    step()
    return counted_allocations(step).peak


@pytest.mark.parametrize(("task", "rows"), [("cb", 1), ("copa", 2)])
def test_classification_needs_what_the_run_allocates(task: str, rows: int, repo_root: Path) -> None:
    job = choice_job(repo_root, task)
    batch = make_micro_batch([choice_example(job)] * 4)
    assert tuple(batch.input_ids.shape) == (4 * rows, 95)
    assert (job.num_rows, job.padded_length) == (rows, 95 * rows)
    planned = Planner().tracer(job.spec).training(job.rows(4))
    highest = max(planned.forward, planned.backward)  # a frozen head's losses are differentiated in the forward pass
    assert highest == pytest.approx(counted_peak(job, batch), rel=0.02)


def test_pretraining_needs_what_the_run_allocates(repo_root: Path) -> None:
    """Full training of the recipe's model on whole chunks; the vocabulary is the one to be trained."""
    job = pretraining_job(repo_root, "data.chunk_tokens=128", "micro_batch_size=4")
    assert (job.length, job.spec.config.vocab_size, job.spec.lora) == (128, 4096, None)
    ids = torch.arange(128)
    batch = make_micro_batch([Example(ids, ids.clone(), 0, number) for number in range(4)])
    planned = Planner().tracer(job.spec).training(job.rows(4))
    assert planned.backward == pytest.approx(counted_peak(job, batch), rel=0.02)


def test_rows_of_candidates() -> None:
    """Those of one token share the prompt's row; the micro-batch is the one of training."""
    assert [num_rows(sizes) for sizes in ((), (1, 1, 1), (1, 2), (3, 1, 2), (2, 2))] == [1, 1, 1, 2, 2]
    batch = choice_micro_batch(3, 10, (3, 1, 2))
    assert tuple(batch.input_ids.shape) == (6, 9)
    assert len(batch.targets) == 3 * 6


def test_every_task_has_its_candidates() -> None:
    """As many as are written, and several tokens where those have several words."""
    texts = dict.fromkeys(("sentence", "premise", "hypothesis", "paragraph", "answer", "passage", "word"), "a b")
    texts |= {f"sentence{n}": "a b" for n in (1, 2)} | {f"choice{n}": "a b" for n in (1, 2)}
    assert CANDIDATE_TOKENS.keys() == WRITERS.keys()
    for task, write in WRITERS.items():
        question = "cause" if task == "copa" else "a b"
        label = "entailment" if task == "rte" else False if task in ("wic", "boolq") else 0
        written = write("here", {**texts, "question": question, "label": label}).candidates
        assert len(CANDIDATE_TOKENS[task]) == len(written)
        several = any(" " in candidate.strip() for candidate in written)
        assert (max(CANDIDATE_TOKENS[task]) > 1) == several


def test_candidates_of_several_tokens_cost_rows_time_and_memory(repo_root: Path) -> None:
    one, several = choice_job(repo_root, "cb"), choice_job(repo_root, "cb", candidate_tokens=3)
    planner = Planner()
    assert several.candidates == (3, 3, 3)
    assert several.padded_length == 3 * one.padded_length
    assert planner.memory(several).peaks["forward"] > 1.5 * planner.memory(one).peaks["forward"]
    forward = [planner.time(job.plain(8), None).flops for job in (one, several)]
    assert 2 < forward[1] / forward[0] < 3.5


def test_length_is_changed_by_its_own_key(repo_root: Path) -> None:
    for job, key in ((choice_job(repo_root, "copa"), "data.max_length=48"), (pretraining_job(repo_root), "data.chunk")):
        found = next(knob for knob in list_changes(Planner(), job, "backward") if knob.kind == "length")
        assert found.override.startswith(key)
        assert found.saved > 0
        assert found.job.mean_length == found.job.padded_length


def test_a_store_says_its_vocabulary(tmp_path: Path, repo_root: Path) -> None:
    """Rounded up as training does."""
    store = f"data.store={tmp_path}"
    manifest = {"vocabulary_size": 3001, "sources": {}, "parts": [], "dtype": "<u2", "tokenizer": ""}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert pretraining_job(repo_root, store).spec.config.vocab_size == 3008
    assert pretraining_job(repo_root, store, "model.vocabulary_multiple=1").spec.config.vocab_size == 3001
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(Exception, match=r"manifest\.json: not readable"):
        pretraining_job(repo_root, store)


@pytest.mark.parametrize("kind", ["choices", "pretraining"])
@pytest.mark.slow
def test_command(kind: str, repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without data, tokenizer or network."""
    arguments = [str(repo_root / "pretrain/recipes/cpu_pile5.yaml")]
    if kind == "choices":
        arguments = [str(repo_root / "finetune/recipes/smollm2_choices.yaml"), *CHOICES, "data.task=copa"]
    assert main(["plan", *arguments, "--num-gpus", "2"]) == 0
    text = capsys.readouterr().out
    shown = "96 tokens (mean 190), 2 candidates in 2 rows" if kind == "choices" else "256 tokens (mean 256)\n"
    assert f"examples of {shown}" in text
    assert main(["plan", *arguments, "--num-gpus", "2", "--compare", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 5


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("finetune/recipes/smollm2_choices.yaml", ["data.task=trec"], "data.task = 'trec'"),
        ("finetune/recipes/smollm2_choices.yaml", ["--label-share", "0.5"], "learns from candidates only"),
        ("finetune/recipes/smollm2_choices.yaml", ["--candidate-tokens", "0"], "--candidate-tokens 0"),
        ("finetune/recipes/smollm2_choices.yaml", ["clusters.num=1"], "clusters.num = 1"),
        ("finetune/recipes/smollm2_math.yaml", ["--candidate-tokens", "2"], "for task: choices only"),
        ("pretrain/recipes/cpu_pile5.yaml", ["data.chunk_tokens=512"], "max_position_embeddings = 256"),
        ("pretrain/recipes/cpu_pile5.yaml", ["data.max_length=512"], "data.max_length"),
        ("pretrain/recipes/cpu_pile5.yaml", ["prepare.tokenizer=no/such"], "model.config.vocab_size"),
        ("pretrain/recipes/cpu_pile5.yaml", ["model.config.model_type=none"], "model.config"),
        ("pretrain/recipes/cpu_pile5.yaml", ["task=poetry"], "no such kind of recipe"),
    ],
)
def test_bad_input(
    recipe: str, arguments: list[str], message: str, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(repo_root / recipe), *arguments]) == 2
    assert message in capsys.readouterr().err
