"""The example files of docs/EVALUATION.md, read and scored as its command says, and its table of keys."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from colm_ds.cli import _parser_of
from colm_ds.evaluation.evaluate import TASK_NAMES, Options, evaluate, read_tasks, task_names
from colm_ds.evaluation.question_files import parse_places
from colm_ds.evaluation.question_log import EvaluationFolder
from tests.evaluation.stubs import StubBackend

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "EVALUATION.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Questions of your own")[2].partition("\n## ")[0]


def knows(prompt: str) -> str:
    """Answer the page's questions as a model would write them."""
    answers = {"eggs": "The answer is 84.", "pens": "The answer is 9.", "depot": " In 1987.\nYes", "support": " max"}
    return next(text for word, text in answers.items() if word in prompt)


def test_the_files_and_the_command_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = re.findall(r"```json (\w+\.jsonl)\n(.*?)```", SECTION, re.DOTALL)
    for name, text in files:
        Path(name).write_text(text, encoding="utf-8")
    (command,) = re.findall(r"```bash\n(colm-ds evaluate .*?)\n```", SECTION)
    parsed = _parser_of("evaluate").parse_args(shlex.split(command)[2:])
    options = Options(tuple(parsed.tasks.split(",")), parse_places(parsed.data, TASK_NAMES))
    for write, share in ((knows, 1.0), (lambda prompt: "The answer is 5.", 0.0)):
        folder = EvaluationFolder(tmp_path / str(share))
        results = evaluate(StubBackend(write), options, folder, title="own", model={})
        assert results is not None
        scored = {name: (task["n"], task["accuracy"]) for name, task in results["tasks"].items()}
        assert scored == {"gsm8k": (2, share), "squad": (2, share)}


def test_a_row_with_the_keys_of_the_table_is_read(tmp_path: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", SECTION, re.MULTILINE)
    values = {"cause": "cause", "answer": "4", "solution": "\\boxed{4}", "label": 1, "source": "a"}
    assert len(rows) == 6
    for name, keys in rows[:-1]:  # perplexity cuts its texts with a tokenizer
        needed = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)|;.*", "", keys))
        record = {key: values.get(key, key) for key in needed} | ({"question": "cause"} if name == "copa" else {})
        (set_name,), _ = task_names([name])
        place = tmp_path / f"{set_name}.jsonl"
        for missing in (None, *needed):
            record_less = {key: value for key, value in record.items() if key != missing}
            record_less |= {"label": True} if name == "boolq" and missing != "label" else {}
            place.write_text(json.dumps(record_less) + "\n")
            options = Options((name,), parse_places([f"{set_name}={place}"], TASK_NAMES))
            if missing is None:
                assert len(read_tasks(options, StubBackend())[0][0].questions) == 1
            else:
                with pytest.raises(Exception, match=f"{set_name}.jsonl:1"):
                    read_tasks(options, StubBackend())
