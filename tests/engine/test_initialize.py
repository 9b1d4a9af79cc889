"""`colm_ds.initialize` with the arguments and configuration files that scripts give it."""

from __future__ import annotations

import inspect
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from colm_ds.batching.loader import RecordDataset
from colm_ds.config.resolve import resolve_config
from colm_ds.engine.arguments import check_collated
from colm_ds.errors import ConfigError, DataError
from tests.config.test_colm import FILES
from tests.engine.conftest import Runner
from tests.engine.training import LARGE, NO_DROPOUT, Case, start, step
from tests.ranks import Ranks
from tests.tiny_models import tiny_model


@pytest.mark.distributed
def test_unknown_family_trains_without_a_probe(outcomes: Runner) -> None:
    for colm in ({"selector": "random"}, {"probe": {"estimator": "tokens"}}):
        case = Case("unknown family", family="gpt2", model=NO_DROPOUT, colm=colm, stage=3)
        steps = outcomes(case, 2)[0].steps
        assert len(steps) == case.steps
        assert all(0 < step.stats["loss"] < 20 for step in steps)
        assert all(step.stats["examples_probed"] == 0 for step in steps)


def test_arguments_are_deepspeeds() -> None:
    import deepspeed

    import colm_ds

    ours, theirs = (inspect.signature(each.initialize).parameters for each in (colm_ds, deepspeed))
    assert [(name, each.default) for name, each in ours.items()] == [
        *((name, each.default) for name, each in theirs.items()),
        ("target_data", None),
    ]


def test_arguments_that_cannot_be_used_are_refused_together() -> None:
    import colm_ds

    args = types.SimpleNamespace(deepspeed_config="here.json", local_rank=0)
    wrong: dict[str, Any] = {"mpu": object(), "mesh_param": (2, 1), "config": 3, "collate_fn": 3}
    wrong |= {"lr_scheduler": "cosine", "dist_init_required": False}
    with pytest.raises(ConfigError) as raised:
        colm_ds.initialize(args, training_data=iter([]), **wrong)
    message = str(raised.value)
    assert message.startswith("9 problems in the arguments of colm_ds.initialize")
    for said in (
        "config and args.deepspeed_config: one configuration is enough",
        "config = 'int': neither a path nor a dict",
        "lr_scheduler = 'str': not a scheduler",
        "dist_init_required = False: there is no process group",
        "model: missing",
        "mpu: the probe needs whole layers",
        "mesh_param: a sequence is not split over ranks",
        "training_data = 'list_iterator': not numbered",
        "collate_fn = 'int': not a function",
    ):
        assert said in message, message
    with pytest.raises(ConfigError, match=r"training_data: missing.* use colm_ds\.CoresetSelector"):
        colm_ds.initialize(model=torch.nn.Linear(1, 1), config={})


def test_what_a_collate_fn_gives_is_checked() -> None:
    model, ids = tiny_model("llama"), torch.tensor([[5, 6]])
    tokens = {"input_ids": ids, "labels": ids}
    with pytest.raises(ConfigError, match="gives position_ids, which the model would read"):
        check_collated(lambda rows: tokens | {"position_ids": 1, "number": 2}, [{}], model)
    for gives, said in (
        ({"input_ids": ids}, r"collate_fn: gives input_ids\. Have it give labels too"),
        (tokens | {"labels": None}, "collate_fn: gives labels as a NoneType. Have it give tensors"),
        (tokens | {"labels": [[5]]}, "collate_fn: gives labels as a list. Have it give tensors"),
        ((ids, ids), "collate_fn: gives a tuple. Have it give a mapping with input_ids and labels"),
    ):
        with pytest.raises(DataError, match=said):
            check_collated(lambda rows, gives=gives: gives, [{}], model)
    check_collated(lambda rows: tokens | {"number": [3], "token_type_ids": None}, [{}], model)


def test_rows_that_are_no_mappings() -> None:
    with pytest.raises(DataError, match=r"example 0: a tuple\. Give mappings, which collate_fn gets without source"):
        check_collated(lambda rows: {}, [([5], [5])], tiny_model("llama"))
    with pytest.raises(DataError, match=r"example 0: a list\. Give mappings with input_ids and labels and source"):
        RecordDataset([[5, 6]])
    with pytest.raises(DataError, match=r"example 1: a tuple\. Give mappings with input_ids and labels\."):
        RecordDataset([{"input_ids": [5, 6]}, ([5, 6], [5, 6])], needs_sources=False)


def run_from_arguments(path: str) -> dict[str, Any]:
    """In a rank: train as scripts do: configuration among parsed arguments, a scheduler, an optimizer, own batches."""
    case = Case("x")
    engine = start(case, config=None, args=types.SimpleNamespace(deepspeed_config=path))
    found = {"by arguments": step(engine).chosen, "train_batch_size": engine.train_batch_size()}
    found["own batch"] = engine.train_batch(engine.loader.batch(4)).step, engine.step_count, engine.num_samples
    found["forward"] = engine(input_ids=torch.tensor([[5, 6, 7]])).logits.shape
    engine.destroy()
    engine = start(case, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, halved))
    found["lr"] = [step(engine).stats["lr"] for _ in range(3)]
    engine.destroy()
    engine = start(case, config=resolve_config(case.config(), dist.get_world_size()))
    found["resolved"] = step(engine).chosen
    engine.destroy()
    args = types.SimpleNamespace(deepspeed_config=None, local_rank=dist.get_rank())
    engine = start(case, config=None, config_params=case.config(), args=args, model_parameters=None)
    found["config_params"] = step(engine).chosen
    engine.destroy()
    model = case.build_model()
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 1e-3} for p in model.parameters()])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, halved)
    engine = start(case, model=model, optimizer=optimizer, lr_scheduler=schedule)
    found["scheduler"] = [step(engine).stats["lr"] for _ in range(3)]
    engine.destroy()
    try:
        start(Case("x", deepspeed={"prescale_gradients": True}, stage=2))
    except ConfigError as error:
        found["refused"] = str(error)
    by_config = Case("x", deepspeed={"optimizer": {}}, stage=2)
    engine = start(by_config, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, betas=(0.8, 0.9)))
    found["client lr"] = step(engine).stats["lr"]
    found["history"] = engine.coreset_selector.state_dict()["selector"]["count"] if is_first(engine) else 1
    engine.destroy()
    return found


def halved(step: int) -> float:
    """Half the learning rate after every step."""
    return 0.5**step


def is_first(engine: Any) -> bool:
    """Whether this is rank 0, which alone keeps the history of `spsa`."""
    return int(engine.global_rank) == 0


@pytest.mark.distributed
def test_arguments_of_initialize(pools: dict[int, Ranks], outcomes: Runner, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(Case("x").config()), encoding="utf-8")
    wanted = outcomes(Case("x"), 2)[0].steps[0].chosen
    for found in pools[2].run(run_from_arguments, str(path)):
        assert found["by arguments"] == found["resolved"] == found["config_params"] == wanted
        assert found["scheduler"] == pytest.approx([1e-3, 5e-4, 2.5e-4])
        assert found["train_batch_size"] == 13
        assert found["own batch"] == (4, 2, 26)
        assert tuple(found["forward"]) == (1, 3, 97)
        assert found["lr"] == pytest.approx([1e-3, 5e-4, 2.5e-4])
        assert found["client lr"] == pytest.approx(3e-4)
        assert "deepspeed.initialize refuses the configuration" in found["refused"]
        assert "pre-scale gradients is not yet supported with ZeRO-2" in found["refused"]
        assert found["history"] == 1


@pytest.mark.distributed
@pytest.mark.parametrize("name", FILES)
def test_file_trains(name: str, outcomes: Runner, repo_root: Path) -> None:
    """In float32 all files take the same two steps; in bf16 they train."""
    runs = {}
    for precision in ("float32", "bfloat16"):
        given = json.loads((repo_root / "ds_configs" / f"{name}.json").read_text(encoding="utf-8"))
        given["bf16"]["enabled"] = precision == "bfloat16"
        colm = {"probe": {"estimator": "exact"}, "coreset_size": 14, "large_batch_size": LARGE}
        case = Case(f"{name}.json", deepspeed=given, colm=colm, stage=int(name[4]), steps=2, dtype=precision)
        runs[precision] = outcomes(case, 2)[0]
    reference = Case("clipped", deepspeed={"gradient_clipping": 1.0}, colm=colm, steps=2)
    assert runs["float32"].chosen == outcomes(reference, 1)[0].chosen
    wanted = [step.stats["loss"] for step in outcomes(reference, 1)[0].steps]
    assert [step.stats["loss"] for step in runs["float32"].steps] == pytest.approx(wanted, rel=1e-6)
    assert [step.stats["loss"] for step in runs["bfloat16"].steps] == pytest.approx(wanted, rel=0.05)
