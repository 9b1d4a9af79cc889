"""Run folders for the export's tests: trained by real ranks, laid out as training leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.training import Case, parameters, start, step
from tests.tiny_models import EOS_ID, VOCABULARY_SIZE, tiny_model

RANK, ALPHA = 4, 8
"""Of the adapter that `tiny_model` adds."""


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer that knows a word for each id of the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": EOS_ID} | {f"w{place}": place for place in range(3, VOCABULARY_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def write_base(folder: Path, case: Case) -> Path:
    """The base model that a case is trained from, as a Hugging Face folder with a tokenizer."""
    model = base_of(case)
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(folder)
    return write_tokenizer(folder)


def base_of(case: Case) -> Any:
    """The model that a case is trained from, without LoRA."""
    model = case.build_model().eval()
    return model.unload() if case.lora else model


def config_of(case: Case, base: Path) -> dict[str, Any]:
    """config.json of a run, as far as the export reads it."""
    lora = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0} if case.lora else None
    recipe: dict[str, Any] = {
        "output_dir": "somewhere",
        "steps": 5,
        "model": {"name_or_path": str(base), "dtype": case.dtype},
        "lora": lora,
        "data": {"train": "gone.jsonl"},
        "colm": {"large_batch_size": 29, "coreset_size": 13},
        "deepspeed": "gone.json",
    }
    colm = {"large_batch_size": 29, "coreset_size": 13, "selector": "colm", "probe": {"estimator": "spsa"}}
    return {"name": f"test of {case.name}", "seed": 3, "sources": {"algebra": 44}, "recipe": recipe, "colm": colm}


def train_and_save(case: Case, run: str, base: str, finish: bool) -> dict[str, Tensor]:
    """In a rank: three steps with checkpoints after the second and third; rank 0 gives back what was trained.

    Args:
        case: what to train.
        run: folder of the run.
        base: folder that holds a tokenizer.
        finish: write the weights as training does at its end.
    """
    from transformers import AutoTokenizer

    from colm_ds.checkpoints.weights import save_trained

    engine = start(case)
    for number in (1, 2, 3):
        step(engine)
        if number > 1:
            engine.save_checkpoint(f"{run}/checkpoints")
    if finish:
        save_trained(engine, AutoTokenizer.from_pretrained(base), Path(run), is_main=dist.get_rank() == 0)
    trained = parameters(engine)
    engine.destroy()
    return trained


def write_run(folder: Path, case: Case, pool: Any, *, finish: bool = False) -> tuple[Path, dict[str, Tensor]]:
    """Train a case on the pool's ranks and lay out its folder and, beside it, its base model.

    Returns:
        The run's folder, and what was trained by name in float32.
    """
    base, run = write_base(folder / "base", case), folder / "run"
    trained = pool.run(train_and_save, case, str(run), str(base), finish)[0]
    (run / "config.json").write_text(json.dumps(config_of(case, base)))
    if finish:
        (run / "summary.json").write_text(json.dumps({"status": "finished", "steps": 3}))
    return run, trained


def expected_logits(case: Case, trained: dict[str, Tensor]) -> Tensor:
    """Logits of the model as it was trained, in float32."""
    model = case.build_model().float()
    model.load_state_dict(trained, strict=False)
    return logits(model)


def logits(model: Any) -> Tensor:
    """Logits of a few tokens, `[2, 7, vocabulary]`, in float32."""
    tokens = torch.arange(3, 17).reshape(2, 7)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tokens).logits
    return found.float()


def random_base(seed: int) -> Any:
    """Some other base model than that of the cases."""
    return tiny_model("llama", seed=seed)
