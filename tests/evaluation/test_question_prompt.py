"""Math questions are asked as a run was trained: by its recorded prompt, or as the command line says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import finetune.evaluate
from colm_ds.data.chat import ChatEncoder
from colm_ds.data.schemas import Conversation
from colm_ds.errors import ConfigError
from colm_ds.evaluation import command_line
from colm_ds.evaluation.backend import TransformersBackend
from colm_ds.evaluation.math_tasks import PROGRAM_SUFFIX, MathQuestion, MathTask
from colm_ds.evaluation.question_prompt import QuestionPrompt, check_prompt, prompt_of_run, read_prompt
from tests.data.chats import chat_tokenizer
from tests.evaluation.stubs import CPU, StubBackend, make_model
from tests.evaluation.test_generate import plain_greedy

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEMPLATES = {
    "alpaca": ALPACA,
    "chat": CHATML,
    "plain": "{}",
    "Q: {instruction}{input}\nA:": "Q: {}\nA:",
    "{system}{prompt} =": "{} =",
    "{{{prompt}}}": "{{{}}}",
}


@pytest.mark.parametrize("style", TEMPLATES)
def test_both_passes_ask_in_the_style(style: str) -> None:
    backend = StubBackend(tokenizer=chat_tokenizer())
    task = MathTask("gsm8k", prompt=QuestionPrompt(check_prompt(style)))
    rows = list(task.answer(backend, [MathQuestion("1 + {1}?", "2")]))
    assert len(rows) == 2  # nothing is answered in either pass
    assert backend.prompts == [TEMPLATES[style].format(f"1 + {{1}}?{suffix}") for suffix in (PROGRAM_SUFFIX, "")]
    assert task.settings == {"max_new_tokens": 512} | ({} if style == "alpaca" else {"prompt": style})


def test_a_chat_prompt_has_the_ids_of_training_and_ends_where_a_turn_ends() -> None:
    """Against a plain loop from the ids that training trains behind; the turn's end is not the model's eos."""
    tokenizer = chat_tokenizer(("<|im_start|>", "<|im_end|>", "</s>"))
    model = make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    backend, prompt = TransformersBackend(model, tokenizer, CPU), QuestionPrompt("chat")
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompt.turn_end(tokenizer) == im_end != tokenizer.eos_token_id
    turns = ({"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"})
    ids = ChatEncoder(tokenizer).encode_prompt(Conversation(turns, (False, True)))
    freely = plain_greedy(model, ids, 12, {tokenizer.eos_token_id})
    ending = freely[4]  # a token that the model does write stands for the turn's end
    expected = plain_greedy(model, ids, 12, {tokenizer.eos_token_id, ending})
    ((_, written),) = next(
        backend.generate(prompt.write(["Add 1 and 2."], tokenizer), max_new_tokens=12, stop_strings=(), turn_end=ending)
    )
    assert len(expected) <= 5
    assert (written.num_tokens, written.reason) == (len(expected), "eos")
    assert written.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_variables_of_the_template() -> None:
    tokenizer = chat_tokenizer(
        template="{% if short %}Be brief. {% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    asked = QuestionPrompt("chat", {"short": True})
    assert asked.write(["1?"], tokenizer) == ["Be brief. user: 1?<|im_end|>assistant: "]
    assert asked.settings == {"prompt": "chat", "chat_template_kwargs": {"short": True}}


@pytest.mark.parametrize("style", ["chatt", "{question}", "{input}", "{prompt", "{0}", "{}"])
def test_faulty_styles(style: str) -> None:
    with pytest.raises(ConfigError, match="--prompt"):
        check_prompt(style)


def test_a_line_break_on_the_command_line() -> None:
    asked = QuestionPrompt(read_prompt(r"Question: {instruction}\nAnswer:"))
    assert asked.write(["1?"], None) == ["Question: 1?\nAnswer:"]
    assert read_prompt("plain") == "plain"


def test_a_template_that_cannot_be_used() -> None:
    none = chat_tokenizer(template=None)
    refusing = chat_tokenizer(template="{{ raise_exception('Only tools here.') }}")
    for tokenizer, parts in ((none, ["no chat template", "--prompt alpaca"]), (refusing, ["Only tools here"])):
        with pytest.raises(ConfigError) as caught:
            QuestionPrompt("chat").turn_end(tokenizer)
        assert all(part in str(caught.value) for part in ["--prompt chat", *parts])


def record(folder: Path, data: dict[str, Any], prompts: list[str] | None) -> Path:
    """Write what a run records, as far as it says how it was trained."""
    recipe = {"model": {"name_or_path": "x"}, "data": data}
    config = {"recipe": recipe} if prompts is None else {"recipe": recipe, "prompts": prompts}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("data", "prompts", "expected"),
    [
        ({"train": "a.jsonl", "prompt": "auto"}, ["chat"], QuestionPrompt("chat")),
        ({"chat_template_kwargs": {"x": 1}}, ["chat"], QuestionPrompt("chat", {"x": 1})),
        ({"chat_template_kwargs": {"x": 1}}, ["alpaca"], QuestionPrompt("alpaca")),
        ({"train": "a.jsonl"}, ["Q: {prompt}"], QuestionPrompt("Q: {prompt}")),
        ({"train": "a.jsonl"}, [], QuestionPrompt("alpaca")),  # a classification task
        # runs from before prompts were recorded
        ({"train": "a.jsonl", "schema": "auto", "prompt": "auto"}, None, QuestionPrompt("alpaca")),
        ({"train": "a.jsonl", "schema": "sharegpt", "prompt": "auto"}, None, QuestionPrompt("chat")),
        ({"train": "a.jsonl", "schema": "alpaca", "prompt": "chat"}, None, QuestionPrompt("chat")),
        ({"train": [{"path": "a", "schema": "text"}]}, None, QuestionPrompt("plain")),
        ({}, None, QuestionPrompt("alpaca")),
    ],
)
def test_prompt_of_a_run(
    data: dict[str, Any], prompts: list[str] | None, expected: QuestionPrompt, tmp_path: Path
) -> None:
    assert prompt_of_run(record(tmp_path, data, prompts)) == expected


def test_several_prompts_ask_for_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prompt_of_run(record(tmp_path, {}, ["alpaca", "chat"]))
    assert "'alpaca', 'chat'" in str(caught.value)
    assert "--prompt alpaca" in str(caught.value)


@pytest.fixture
def run_on_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a tiny model that was trained on conversations."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    tokenizer = chat_tokenizer()
    folder = tmp_path / "run"
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return record(folder, {"train": "a.jsonl", "prompt": "auto"}, ["chat"])


def test_the_command_asks_as_the_run_was_trained(
    run_on_chats: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    generate = TransformersBackend.generate

    def note(backend: Any, prompts: Any, **options: Any) -> Any:
        asked.extend(prompts)
        return generate(backend, prompts, **options)

    monkeypatch.setattr(TransformersBackend, "generate", note)
    out = run_on_chats.parent / "out"
    common = ["--tasks", "gsm8k", "--data", str(data), "--limit", "1", "--max-new-tokens", "4", "--out", str(out)]
    finetune.evaluate.main([str(run_on_chats), *common])
    assert asked[0].startswith("<|im_start|>user\nAdd ")
    assert asked[0].endswith(f"{PROGRAM_SUFFIX}<|im_end|>\n<|im_start|>assistant\n")
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["prompt"] == "chat"
    with pytest.raises(SystemExit):
        finetune.evaluate.main([str(run_on_chats), *common, "--prompt", "alpaca"])
    assert "gsm8k.prompt: 'chat' there, None here" in capsys.readouterr().err
    asked.clear()
    finetune.evaluate.main([str(run_on_chats), *common, "--prompt", "alpaca", "--overwrite"])
    assert asked[0].startswith("Below is an instruction")


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        (["alpaca", "plain"], [], "Say with which of them to ask"),
        (["chat"], ["--prompt", "caht"], "--prompt caht: no such style"),
    ],
)
def test_bad_prompts_are_said_before_a_model_is_loaded(
    prompts: list[str],
    arguments: list[str],
    message: str,
    run_on_chats: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command_line, "load", lambda source: pytest.fail("a model was loaded"))
    record(run_on_chats, {"train": "a.jsonl"}, prompts)
    with pytest.raises(SystemExit) as stopped:
        finetune.evaluate.main([str(run_on_chats), "--tasks", "gsm8k", "--data", str(data), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
