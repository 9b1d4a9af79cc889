"""The `"colm"` section of a DeepSpeed configuration: its keys, their defaults, and the paper's preset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from colm_ds.config.section import Section

if TYPE_CHECKING:
    from colm_ds.selection import Needs


class MaskConfig(Section):
    """The coordinates in which gradients are compared."""

    size: Literal["auto"] | int = Field("auto", description="h; auto: the model's hidden size")
    criterion: Literal["grad", "weight", "weight_grad", "random"] = Field("grad", description="how they are chosen")


class ProbeConfig(Section):
    """Estimate of the signal of every example."""

    estimator: Literal["spsa", "exact", "sketch", "projection", "tokens"] = Field(
        "spsa",
        description="spsa (the paper's), exact, sketch, projection of the exact gradient on random directions, or "
        "tokens: the labels' input embeddings, without any pass of the model; by default sketch with source store and "
        "for vector_sum, grab, greats and opus",
    )
    source: Literal["pass", "store"] = Field(
        "pass",
        description="where sketches come from: a pass over the large batch; or store: the pass that last trained each "
        "example, which costs none (colm, balanced and importance, in the step of colm_ds.initialize)",
    )
    max_age: float = Field(
        2.0, gt=0, description="store: epochs (passes over the large batches) after which a sketch counts as missing"
    )
    layer: Literal["v_proj", "qkv", "fc"] = Field(
        "v_proj", description="of the last layer: its V projection, all of Q, K and V, or the MLP's output projection"
    )
    epsilon: float = Field(1e-3, gt=0, description="spsa: size of the step in both directions")
    num_probes: Literal["auto"] | int = Field(
        "auto", description="K: directions or sketches; auto: 1, sketch and projection 256"
    )
    direction_rank: Literal["full"] | Annotated[int, Field(ge=1)] = Field(
        "full", description="spsa: rank of the random step as a matrix (low-rank MeZO); full: every entry independently"
    )
    refresh: Literal["step", "run"] = Field("step", description="new directions every step, or one set for the run")
    sample: float = Field(1.0, gt=0, le=1, description="share of the examples outside small sources that is probed")
    token_sample: float = Field(
        1.0, gt=0, le=1, description="share of every example's labelled tokens whose loss a gradient is estimated from"
    )
    length_power: float = Field(
        1 / 3, ge=0, le=2, description="tokens: features are divided by the number of labelled tokens to this power"
    )
    dtype: Literal["auto", "bfloat16"] = Field("auto", description="trunk's compute; auto: as the model trains")
    precision: Literal["auto", "float32", "float64"] = Field(
        "auto", description="spsa's last layer and head; float64 (auto on a CPU): same choice on any number of ranks"
    )
    max_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="padded tokens of one micro-batch of the probe; auto: 2048 on a CPU (its caches), else 8192"
    )

    @property
    def passes_model(self) -> bool:
        """Return whether estimating gradients takes a pass of the model."""
        return self.estimator != "tokens" and not self.is_stored

    @property
    def is_stored(self) -> bool:
        """Return whether signals are sketches that training's own passes left."""
        return self.source == "store"

    @property
    def resolved_num_probes(self) -> int:
        """K."""
        if self.num_probes == "auto":
            return 256 if self.estimator in ("sketch", "projection") else 1
        return self.num_probes

    def resolved_max_tokens(self, device_type: str) -> int:
        """Return the padded tokens of a probe micro-batch; larger ones leave a CPU's caches (benchmarks/README.md)."""
        if self.max_tokens == "auto":
            return 2048 if device_type == "cpu" else 8192
        return self.max_tokens


class ScheduleConfig(Section):
    """Steps in which the selector runs; the others train on a random b of r."""

    start_step: int = Field(0, ge=0, description="plain steps before the first selection")
    every: int = Field(1, ge=1, description="select in every n-th step from then on")
    end_step: int = Field(0, ge=0, description="last step in which the selector runs; 0: no last one")
    plain_every: int = Field(0, ge=0, description="every n-th step of the run is plain; 0: none")

    def selects(self, step: int) -> bool:
        """Return whether the selector runs in a 1-based step."""
        started = step > self.start_step and (step - self.start_step - 1) % self.every == 0
        ended = 0 < self.end_step < step
        return started and not ended and not (self.plain_every and step % self.plain_every == 0)

    @property
    def ever_selects(self) -> bool:
        """Return whether there is a step in which the selector runs."""
        period = self.every * max(1, self.plain_every)  # after which steps repeat
        return any(map(self.selects, range(self.start_step + 1, self.start_step + period + 1)))

    def share(self, num_steps: int) -> float:
        """Return the share of a run's steps in which the selector runs; 0 steps: that of the first thousand."""
        num_steps = num_steps or 1000
        return sum(map(self.selects, range(1, num_steps + 1))) / num_steps


def changed(section: Section, keys: Iterable[str]) -> list[str]:
    """Return those of the keys whose values in a section are not the defaults, which presets write too."""
    defaults = {key: type(section).model_fields[key].get_default(call_default_factory=True) for key in keys}
    return [key for key, default in defaults.items() if getattr(section, key) != default]


HELD_OUT = "held_out"
"""In place of a file: the target is drawn from the recipe's held-out examples."""


class TargetConfig(Section):
    """Examples that selectors with a target compare with; they are never trained on."""

    data: str | None = Field(
        None,
        description="file of records like those of the training data; or held_out: from the recipe's held-out part, "
        "whose loss is then that of the rest; a script gives target_data instead",
    )
    size: int = Field(32, ge=1, description="m: examples drawn from it for the run")
    batch: int = Field(8, ge=1, description="of them passed through the model at each refresh")
    refresh: int = Field(1, ge=1, description="steps between refreshes; each takes the next of the m, shuffled")
    mix: Literal["given", "equal"] = Field("given", description="draw them as they come, or as many of every source")


class MemoryConfig(Section):
    """Memory records beyond the peaks of every step."""

    count_steps: list[int] = Field(
        default_factory=list,
        description="on a CPU: steps whose allocations are counted one by one (slow)",
    )
    snapshot: bool = Field(
        False, description="on a GPU: write PyTorch's allocator snapshot of snapshot_step, and when memory runs out"
    )
    snapshot_step: int = Field(2, ge=1, description="the step, counted from this start of the run")
    folder: str = Field(".", description="where snapshots are written; a run from a recipe writes into its output_dir")


PAPER: dict[str, Any] = {
    "selector": "colm",
    "small_sources": "auto",
    "small_share": 1.0,
    "per_source": True,
    "quotas": "independent",
    "geometry": "adam",
    "metric": "l1",
    "weights": "uniform",
    "loss_normalization": "example",
    "mask": {"size": "auto", "criterion": "grad"},
    "probe": {
        "estimator": "spsa",
        "source": "pass",
        "max_age": 2.0,
        "layer": "v_proj",
        "epsilon": 1e-3,
        "num_probes": 1,
        "direction_rank": "full",
        "refresh": "step",
        "sample": 1.0,
        "token_sample": 1.0,
        "length_power": 1 / 3,
    },
    "schedule": {"start_step": 0, "every": 1, "end_step": 0, "plain_every": 0},
    "options": {},
    "outer_rules": "auto",
    "target": {},
}
"""Every key of the section that decides what is chosen and how it is weighted, as in the paper."""

PRESETS: dict[str, dict[str, Any]] = {"paper": PAPER}

FITS_TOKENS: dict[str, Any] = {
    "selector": "importance",
    "small_sources": "none",
    "per_source": False,
    "geometry": "plain",
    "metric": "euclidean",
    "weights": "uniform",
}
"""Values of `auto` for the estimator `tokens`: draws by importance from one pool, compared as they are.

With `selector: colm` the medoids' weights match the pool's mean instead. Medoids are level with draws in one step, but
their errors add up over steps (docs/WHEN.md).
"""

FITS_GRADIENTS: dict[str, Any] = {
    "selector": "colm",
    "small_sources": "auto",
    "per_source": True,
    "geometry": "adam",
    "metric": "l1",
    "weights": "uniform",
}
"""Values of `auto` for every other estimator: the paper's choice; `auto` small sources are those under |V|/c."""


def with_preset(values: Any) -> Any:
    """Fill in the keys of a section's preset, and the values of `auto` for its estimator; given values take precedence.

    If an estimator other than the preset's is given, its own values take precedence over the preset's.
    """
    if not isinstance(values, Mapping):
        return values
    probe = values.get("probe")
    if isinstance(probe, Section):
        probe = probe.model_dump(exclude_unset=True)
    tokens = isinstance(probe, Mapping) and probe.get("estimator") == "tokens"
    fitting = dict(FITS_TOKENS if tokens else FITS_GRADIENTS)
    vectors = _compares_vectors(values)
    if tokens and values.get("selector") == "colm":
        fitting["weights"] = "matched"
    draws = values.get("selector") in OWN_WEIGHTS
    if (vectors or draws) and not tokens:
        fitting["geometry"] = "adam" if values.get("selector") == "opus" else "plain"
    stored = isinstance(probe, Mapping) and probe.get("source") == "store"
    if stored:
        fitting["geometry"] = "plain"
    preset = PRESETS.get(str(values.get("preset")), {})
    filled = {key: value for key, value in values.items() if not (key in fitting and _is_auto(value))}
    if vectors and (probe is None or (isinstance(probe, Mapping) and "estimator" not in probe)):
        filled["probe"] = {**(probe or {}), "estimator": "sketch"}
    if stored and isinstance(probe, Mapping):
        filled["probe"] = {"estimator": "sketch", "refresh": "run", **probe}
    if tokens or vectors or draws or stored:
        filled = {**fitting, **filled}
    for key, pinned in preset.items():
        written = filled.get(key, {})
        if not isinstance(pinned, dict):
            filled.setdefault(key, pinned)
        elif isinstance(written, Mapping):
            other = written.get("estimator", pinned.get("estimator")) != pinned.get("estimator")
            filled[key] = {name: value for name, value in pinned.items() if not (other and name == "num_probes")}
            filled[key] |= written
    return {**fitting, **filled}


OWN_WEIGHTS = ("balanced", "importance")
"""Selectors by CoLM's signals that weigh their picks themselves."""

WITHOUT_VECTORS = ("colm", "random", "keep_random", "full", *OWN_WEIGHTS)
"""Selectors that compare neither vectors nor a target: known here, so that checking their keys needs no torch."""


def _compares_vectors(values: Mapping[str, Any]) -> bool:
    """Return whether the selector that is written in a section compares gradients as vectors."""
    name, options = values.get("selector", "auto"), values.get("options")
    if name in ("auto", *WITHOUT_VECTORS):
        return False
    from colm_ds.selection import needs_of

    return needs_of(str(name), options if isinstance(options, Mapping) else {}).vectors


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


class CoLMSection(Section):
    """The `"colm"` section."""

    preset: Literal["paper"] | None = Field(
        None, description="paper: every key that decides about the choice is the paper's, unless it is written here"
    )
    large_batch_size: int = Field(ge=1, description="r: examples inspected in every step")
    coreset_size: int | None = Field(None, ge=1, description="b: examples trained on; default: train_batch_size")
    selector: str = Field(
        "colm",
        description="auto: colm, with tokens importance; colm (medoids); importance and balanced (unbiased draws by "
        "the same signal); random, keep_random, full (plain training on b, small sources kept, all r); a baseline: "
        "big_loss, gradient_norm, middle_perplexity, completion_length, least_confidence, hidden_medoids; or another "
        "system: ccs, simcore, goracs, vector_sum, "
        "selective_backprop, greats, opus, grab, rho_loss, infobatch, loss_band, delta_loss",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="options of the selector by name, see its page in docs/selectors"
    )
    outer_rules: Literal["auto", "on", "off"] = Field(
        "auto",
        description="small sources kept and quotas by source around the selector's rule; auto: on, but off for random, "
        "full and the baselines, which ignore sources",
    )
    target: TargetConfig = TargetConfig()
    small_sources: Literal["auto", "below_mean", "none"] | list[str | int] = Field(
        "auto",
        description="kept whole: below_mean (those of fewer than |V|/c examples), none, or a list of names or ids; "
        "auto: below_mean, with tokens none",
    )
    small_share: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "auto",
        description="part of b that kept small sources may fill; auto: with r above 2 b what r = 2 b would keep",
    )
    per_source: bool = Field(
        True, description="medoids per big source, or of all big sources together; auto: true, with tokens false"
    )
    quotas: Literal["carry", "independent"] = Field(
        "carry",
        description="how exact shares of the big sources become whole picks: the rounding of a step is carried over to "
        "the next, or each step stands alone (the paper's)",
    )
    geometry: Literal["adam", "plain"] = Field(
        "adam",
        description="compare gradients as Adam would scale them, by the history of selected ones, or as they are; "
        "auto: adam; plain with tokens, with stored sketches, for importance and balanced, vector_sum, grab and greats",
    )
    metric: Literal["l1", "euclidean", "cosine"] = Field(
        "l1", description="distance between examples; auto: l1, with tokens euclidean"
    )
    weights: Literal["uniform", "cluster", "matched"] = Field(
        "uniform", description="loss weights of medoids; auto: uniform, with selector colm and tokens matched"
    )
    loss_normalization: Literal["example", "token"] = Field("example", description="mean over examples or tokens")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="maximum padded tokens of one training micro-batch, beside its number of examples"
    )
    packing: Literal["off", "on"] | Annotated[int, Field(ge=1)] = Field(
        "off",
        description="lay chosen examples one after another in rows, each attending to itself alone: on: rows as long "
        "as the dataset's longest example; or tokens of a row. A micro-batch then has micro_batch_size rows",
    )
    mask: MaskConfig = MaskConfig()
    probe: ProbeConfig = ProbeConfig()
    replay: Literal["auto", "on", "off", "offload"] = Field(
        "auto",
        description="train from the probe's hidden states (with activation checkpointing); offload: from host memory",
    )
    schedule: ScheduleConfig = ScheduleConfig()
    variance_every: int = Field(
        0, ge=0, description="measure the variance of the coreset's gradient every n steps, by a pass over r; 0: never"
    )
    memory: MemoryConfig = MemoryConfig()
    num_workers: int = Field(
        0,
        ge=0,
        description="processes that read the next large batches ahead; where the choice needs no pass of the model, "
        "threads that read the chosen rows",
    )
    max_skipped_steps: int = Field(
        20, ge=0, description="end the run after this many steps in a row whose gradient was not finite; 0: never"
    )
    phase_timeout_s: float = Field(
        1800.0, ge=0, description="end a rank whose phase (probe, train, save, ...) lasts longer, in seconds; 0: never"
    )
    seed: int = Field(
        0,
        ge=0,
        description="seeds the data order and every random choice of the selection; in a recipe by default its seed",
    )

    @property
    def needs(self) -> Needs:
        """Return what the selector needs with its options."""
        from colm_ds.selection import needs_of

        return needs_of(self.selector, self.options, self.outer_rules)

    @property
    def signal(self) -> str | None:
        """Return the signal that the selector needs with its options."""
        return self.needs.signal

    @property
    def needs_target(self) -> bool:
        """Return whether the selector compares with a target."""
        return self.selector not in WITHOUT_VECTORS and self.needs.target

    @property
    def probes_model(self) -> bool:
        """Return whether the selector's signal takes a pass of the model over the large batch."""
        return self.signal is not None and (self.signal != "gradient" or self.probe.passes_model)

    @property
    def stores_sketches(self) -> bool:
        """Return whether the selector goes by sketches that training's own passes left."""
        return self.signal == "gradient" and self.probe.is_stored

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        return with_preset(values)

    @field_validator("outer_rules", "replay", "packing", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        """Read a bare on or off, which YAML makes a truth value, as text."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value
