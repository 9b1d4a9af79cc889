"""What `colm-ds export` writes loads without colm_ds and gives the logits of the model that was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from colm_ds.checkpoints import atomic
from colm_ds.checkpoints.weights import save_model
from colm_ds.cli import main
from colm_ds.data.token_cache import describe_tokenizer
from colm_ds.errors import CheckpointError, ConfigError
from colm_ds.export.run import _class_that_reads, export_run, put_trained
from colm_ds.models.families import read_tokenizer
from colm_ds.recipes.sections import LoraConfig
from tests.engine.training import NOTHING_PERSISTS, Case
from tests.export.runs import base_of, expected_logits, logits, random_base, write_run
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

STAGES: dict[int, dict[str, Any]] = {0: {}, 1: {}, 2: {}, 3: NOTHING_PERSISTS}
TIED = {"tie_word_embeddings": True}
RANDOM = {"selector": "random"}
BFLOAT16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def case_of(stage: int, lora: bool, **changes: Any) -> Case:
    return Case(f"stage {stage}", lora=lora, colm=RANDOM, stage=stage, zero=STAGES[stage], **changes)


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def lora_run(pool: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A finished LoRA run; tests that change it take a copy."""
    return write_run(tmp_path_factory.mktemp("lora"), case_of(2, True), pool, finish=True)


@pytest.fixture
def unfinished(lora_run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A copy of that run as it was before its end: two checkpoints and nothing else."""
    run = tmp_path / "run"
    shutil.copytree(lora_run[0], run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    return run


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def load_adapter(base: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_adapter_and_merged_model_give_the_trained_logits(stage: int, pool: Ranks, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    case = case_of(stage, True)
    run, trained = write_run(tmp_path, case, pool)
    wanted = expected_logits(case, trained)
    assert difference(wanted, logits(base_of(case))) > 0.01
    adapter = export_run(run, out=tmp_path / "adapter")
    assert (adapter.kind, adapter.step, adapter.num_tensors) == ("adapter", 3, len(trained))
    assert difference(logits(load_adapter(base_of(case), adapter.folder)), wanted) <= 1e-5
    merged = export_run(run, merge=True, out=tmp_path / "merged")
    model = load_model(merged.folder)
    assert difference(logits(model), wanted) <= 1e-5
    assert model.generation_config.max_new_tokens == 17
    for folder in (adapter.folder, merged.folder):
        assert AutoTokenizer.from_pretrained(folder)("w5 w6")["input_ids"] == [5, 6]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", STAGES)
def test_full_model_gives_the_trained_logits(stage: int, tied: bool, pool: Ranks, tmp_path: Path) -> None:
    case = case_of(stage, False, model=TIED if tied else {})
    run, trained = write_run(tmp_path, case, pool)
    done = export_run(run)
    assert done.folder == run / "export" / "model_step_3"
    model = load_model(done.folder)
    assert difference(logits(model), expected_logits(case, trained)) <= 1e-5
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(done.folder / "model.safetensors")) == (not tied)
    assert model.generation_config.max_new_tokens == 17


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_half_precision(stage: int, lora: bool, pool: Ranks, tmp_path: Path) -> None:
    if stage == 0:
        precision = {"bf16": {"enabled": True}}  # DeepSpeed has no float32 accumulation there
    else:
        precision = BFLOAT16
    case = case_of(stage, lora, dtype="bfloat16", deepspeed=precision)
    run, trained = write_run(tmp_path, case, pool)
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    same = load_file(export_run(run, out=tmp_path / "same").folder / file)
    wide = load_file(export_run(run, out=tmp_path / "wide", dtype="float32").folder / file)
    for name, value in trained.items():
        name = name.replace(".default", "")
        assert same[name].dtype == torch.bfloat16
        assert torch.equal(same[name].float(), value)
        assert wide[name].dtype == torch.float32
        assert torch.equal(wide[name].bfloat16(), same[name])


def test_merging_in_half_precision_rounds_once(pool: Ranks, tmp_path: Path) -> None:
    case = case_of(2, True, dtype="bfloat16", deepspeed=BFLOAT16)
    run, trained = write_run(tmp_path, case, pool)
    exact = case.build_model().float()
    exact.load_state_dict(trained, strict=False)
    wanted = exact.merge_and_unload().state_dict()
    found = load_file(export_run(run, merge=True).folder / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name].bfloat16()) for name in wanted)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_finished_run_gives_its_last_weights(lora: bool, pool: Ranks, tmp_path: Path) -> None:
    case = case_of(3, lora)
    run, trained = write_run(tmp_path, case, pool, finish=True)
    shutil.rmtree(run / "checkpoints")
    done = export_run(run)
    assert (done.source, done.step) == (run / done.kind, 3)
    wanted = expected_logits(case, trained)
    model = load_adapter(base_of(case), done.folder) if lora else load_model(done.folder)
    assert difference(logits(model), wanted) <= 1e-5
    if lora:
        assert difference(logits(load_model(export_run(run, merge=True).folder)), wanted) <= 1e-5


def test_a_run_whose_final_evaluation_failed_gives_its_last_weights(
    lora_run: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    run = shutil.copytree(lora_run[0], tmp_path / "run")
    (run / "summary.json").write_text(json.dumps({"status": "not evaluated", "steps": 3}))
    shutil.rmtree(run / "checkpoints" / "step_3")
    done = export_run(run)
    assert (done.source, done.step) == (run / "adapter", 3)


@pytest.mark.parametrize("moved", [False, True])
def test_a_checkpoint_gets_the_chat_template_of_the_recipe(
    moved: bool, unfinished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, config = unfinished / "own.jinja", unfinished / "config.json"
    file.write_text("of the recipe")
    values = json.loads(config.read_text())
    values["recipe"]["data"]["chat_template"] = str(file)
    config.write_text(json.dumps(values))
    if moved:
        file.unlink()
    template = read_tokenizer(str(export_run(unfinished).folder)).chat_template
    assert template == (None if moved else "of the recipe")
    assert ("own.jinja" in caplog.text) == moved


def test_a_full_disk_is_one_message(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"could not be written: No space left on device .*\. No files are left"):
        export_run(unfinished)


def test_checkpoint_by_name(lora_run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    run, trained = lora_run
    second = export_run(run, tag="step_2", out=tmp_path / "second")
    third = export_run(run, tag="step_3", out=tmp_path / "third")
    assert (second.step, third.step) == (2, 3)
    held = [load_file(done.folder / "adapter_model.safetensors") for done in (second, third)]
    name = next(iter(trained))
    assert torch.equal(held[1][name.replace(".default", "")], trained[name])
    assert not torch.equal(held[0][name.replace(".default", "")], trained[name])
    with pytest.raises(CheckpointError, match=r"step_9: no such checkpoint. There are: step_2, step_3\."):
        export_run(run, tag="step_9")


def test_trained_weights_go_into_a_model(lora_run: tuple[Path, dict[str, Tensor]]) -> None:
    """Of a finished run and of its checkpoints, as `colm-ds check --at` measures them."""
    run, trained = lora_run
    lora, name = LoraConfig(rank=4, alpha=8), next(iter(trained))
    held = {}
    for place, step in ((run, 3), (run / "checkpoints" / "step_3", 3), (run / "checkpoints" / "step_2", 2)):
        model = case_of(2, True).build_model()
        path, found = put_trained(model, lora, place, "float32")
        assert found == step
        assert path == (run / "adapter" if place == run else place)
        held[place.name] = dict(model.named_parameters())
        assert all(held[place.name][each].requires_grad for each in trained)
    for at in (run.name, "step_3"):
        assert all(torch.equal(held[at][each], value) for each, value in trained.items())
    assert not torch.equal(held["step_2"][name], trained[name])
    with pytest.raises(ConfigError, match=r"step_9: no such folder\. There are: step_2, step_3\."):
        put_trained(case_of(2, True).build_model(), lora, run / "checkpoints" / "step_9", "float32")


@pytest.mark.parametrize("finish", [False, True])
def test_full_weights_go_into_a_model(finish: bool, pool: Ranks, tmp_path: Path) -> None:
    case = case_of(2, False, model=TIED)
    run, trained = write_run(tmp_path, case, pool, finish=finish)
    model = case.build_model()
    put_trained(model, None, run, "float32")
    assert difference(logits(model), expected_logits(case, trained)) <= 1e-6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_base_model_that_has_moved(unfinished: Path, lora_run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    base = tmp_path / "moved"
    shutil.copytree(lora_run[0].parent / "base", base)
    config = json.loads((unfinished / "config.json").read_text())
    config["recipe"]["model"]["name_or_path"] = str(tmp_path / "gone")
    (unfinished / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"gone.*--tokenizer"):
        export_run(unfinished)
    with pytest.raises(ConfigError, match=r"gone.*--model"):
        export_run(unfinished, tokenizer=str(base))
    done = export_run(unfinished, model=str(base))
    written = json.loads((done.folder / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base)
    merged = load_model(export_run(unfinished, model=str(base), merge=True).folder)
    assert difference(logits(merged), expected_logits(case_of(2, True), lora_run[1])) <= 1e-5


def test_a_tokenizer_that_is_all_in_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`AutoTokenizer` reads what lies beside a Qwen2 by the rules of Qwen2's own: other ids than those of training."""
    from transformers import AutoTokenizer

    from tests.evaluation.stubs import make_tokenizer
    from tests.tiny_models import tiny_model

    made = make_tokenizer(tmp_path / "made")
    made.backend_tokenizer.normalizer = None
    for family in ("llama", "qwen2"):
        folder = tmp_path / family
        tiny_model(family).save_pretrained(folder)
        made.save_pretrained(folder)
        text = "Hello world, 12 \u00c4rzte.\n\nfoo  bar"
        assert read_tokenizer(str(folder))(text)["input_ids"] == made(text)["input_ids"]
        usual = describe_tokenizer(AutoTokenizer.from_pretrained(folder)) == describe_tokenizer(made)
        assert _class_that_reads(folder, made) == ("AutoTokenizer" if usual else "PreTrainedTokenizerFast")
        assert len(caplog.records) == (0 if usual else 1)


def test_a_run_of_another_recipe_is_refused(lora_run: tuple[Path, dict[str, Tensor]]) -> None:
    """Where its weights are put into a recipe's model no option names another base."""
    model = case_of(2, True, model={"hidden_size": 48}).build_model()
    with pytest.raises(CheckpointError, match=r"Name a run that was trained by this recipe, with its model and LoRA"):
        put_trained(model, LoraConfig(rank=4, alpha=8), lora_run[0], "float32")


def test_another_base_model_is_refused(unfinished: Path, tmp_path: Path) -> None:
    from tests.tiny_models import tiny_model

    config = json.loads((unfinished / "config.json").read_text())
    tokenizer = config["recipe"]["model"]["name_or_path"]
    tiny_model("llama", hidden_size=48).save_pretrained(tmp_path / "wide")
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "deep")
    for folder, message in (("wide", "do not fit the model"), ("deep", "are missing")):
        with pytest.raises(CheckpointError, match=f"{message}.*--model"):
            export_run(unfinished, model=str(tmp_path / folder), tokenizer=tokenizer)
    assert not (unfinished / "export").exists()


def test_truncated_checkpoint_is_passed_over(unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = unfinished / "checkpoints" / "step_3" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["export", str(unfinished)]) == 0
    output = capsys.readouterr()
    assert "passed over step_3: mp_rank_00_model_states.pt has" in output.err
    assert "trained tensors after step 2" in output.out
    assert "adapter_step_2: adapter in float32" in output.out
    assert main(["export", str(unfinished), "--checkpoint", "step_3"]) == 2
    assert "mp_rank_00_model_states.pt has" in capsys.readouterr().err
    shutil.rmtree(unfinished / "checkpoints" / "step_2")
    with pytest.raises(CheckpointError, match="none of its checkpoints can be loaded"):
        export_run(unfinished)


def test_nothing_to_export(unfinished: Path, tmp_path: Path) -> None:
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(CheckpointError, match=r"not finished, and checkpoints/ holds no checkpoint.*save_every"):
        export_run(unfinished)
    (unfinished / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export_run(unfinished)
    (unfinished / "checkpoints" / "step_1").mkdir()
    with pytest.raises(CheckpointError, match="step_1: holds no state of colm_ds"):
        export_run(unfinished)
    (unfinished / "summary.json").write_text('{"status": "finished"}')
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(CheckpointError, match="finished, but its adapter/ is missing"):
        export_run(unfinished)
    with pytest.raises(ConfigError, match="no such folder"):
        export_run(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="holds no recipe"):
        export_run(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "empty", "not finite"])
def test_checkpoint_without_all_of_its_weights(unfinished: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = unfinished / "checkpoints" / "step_3" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    name = next(name for name in state["module"] if "lora_B" in name)
    if damage == "missing":
        del state["module"][name]
    elif damage == "empty":
        state["module"][name] = torch.zeros(0)
    else:
        state["module"][name][0, 0] = float("nan")
    torch.save(state, file)
    monkeypatch.setattr(atomic, "why_not_whole", lambda path: None)
    said = {"missing": "1 of 16 trained tensors are not in it", "empty": "is empty", "not finite": "not finite"}[damage]
    with pytest.raises(CheckpointError, match=said) as error:
        export_run(unfinished)
    assert name in str(error.value)
    assert not (unfinished / "export").exists()


def test_final_adapter_without_all_of_its_weights(lora_run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run[0], run)
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file)
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        export_run(run)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"cannot be read.*--checkpoint"):
        export_run(run)
    assert export_run(run, tag="step_3").num_tensors == len(tensors)


def test_generation_configuration_that_transformers_finds_wrong(tmp_path: Path) -> None:
    """Published models sample with a temperature and without `do_sample`; `save_pretrained` refuses that."""
    model = base_of(case_of(0, False))
    model.generation_config.temperature = 0.6
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6
    assert difference(logits(load_model(tmp_path)), logits(model)) == 0
    assert model.generation_config.temperature == 0.6


def test_model_that_was_read_from_a_quantized_file(tmp_path: Path) -> None:
    """What reads GGUF files stays attached to the model, and `save_pretrained` takes the weights for quantized."""
    model = base_of(case_of(0, False))
    model.hf_quantizer = object()
    save_model(model, tmp_path)
    assert difference(logits(load_model(tmp_path)), logits(model)) == 0


def test_what_can_not_be_asked_for(
    lora_run: tuple[Path, dict[str, Tensor]], tmp_path: Path, pool: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_run(lora_run[0], out=taken)
    assert (taken / "thesis.txt").read_text() == "mine"
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(ConfigError, match=r"--out \.: the folder that this runs in"):
        export_run(lora_run[0].absolute(), out=".")
    full, _ = write_run(tmp_path, case_of(0, False), pool)
    with pytest.raises(ConfigError, match="--merge is for LoRA"):
        export_run(full, merge=True)


def test_tied_weights_are_not_merged_into(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from colm_ds.export.run import merge_adapter
    from tests.tiny_models import tiny_model

    model = get_peft_model(tiny_model("llama", tie_word_embeddings=True), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match="tied"):
        merge_adapter(model, torch.float32)


def test_another_base_gives_other_logits(lora_run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """The logits above would mean little if any base gave them."""
    done = export_run(lora_run[0], out=tmp_path / "adapter")
    wanted = expected_logits(case_of(2, True), lora_run[1])
    assert difference(logits(load_adapter(random_base(5), done.folder)), wanted) > 0.1
