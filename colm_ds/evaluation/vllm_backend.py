"""vLLM behind the same interface: faster generation on GPUs. Optional; imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colm_ds.data.prompt import encode_pair, encode_text, leading_special_ids
from colm_ds.errors import ConfigError
from colm_ds.evaluation.generate import Generation
from colm_ds.evaluation.likelihood import Likelihood
from colm_ds.evaluation.model_source import ModelSource

MAX_LORA_RANK = 128
"""vLLM sets room aside for adapters up to this rank: the recipes' rank."""


class VllmBackend:
    """A model inside vLLM, which batches by itself; prompts are given as the token ids that training uses.

    Args:
        source: from `find_model`.
        tokenizer: of the model.

    Raises:
        ConfigError: if vLLM is not installed or the model has no files that it can read.
    """

    name = "vllm"

    def __init__(self, source: ModelSource, tokenizer: Any) -> None:
        try:
            vllm: Any = importlib.import_module("vllm")
        except ImportError:
            raise ConfigError(
                "--backend vllm: vLLM is not installed. Run pip install vllm (it needs a GPU), or leave --backend out."
            ) from None
        if source.base.name_or_path is None:
            raise ConfigError("--backend vllm: the base model is built from a configuration and has no files.")
        path = source.base.name_or_path
        model = str(Path(path) / source.base.gguf_file) if source.base.gguf_file else path
        adapter = {"enable_lora": True, "max_lora_rank": MAX_LORA_RANK} if source.adapter else {}
        self.tokenizer = tokenizer
        self._vllm = vllm
        self._llm: Any = vllm.LLM(
            model=model, tokenizer=source.tokenizer or path, dtype=source.base.dtype, seed=0, **adapter
        )
        self._lora: Any = None
        if source.adapter is not None:
            requests = importlib.import_module("vllm.lora.request")
            self._lora = requests.LoRARequest("adapter", 1, str(source.adapter))
        self._leading = leading_special_ids(tokenizer)

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop_strings: Sequence[str]
    ) -> Iterator[list[tuple[int, Generation]]]:
        """See `Backend.generate`; all come in one batch."""
        if not prompts:
            return
        options = self._vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop=list(stop_strings) or None)
        answers = self._ask([encode_text(self.tokenizer, prompt, self._leading) for prompt in prompts], options)
        written = [answer.outputs[0] for answer in answers]
        yield [(place, _generation(output)) for place, output in enumerate(written)]

    def score(self, questions: Sequence[tuple[str, Sequence[str]]]) -> Iterator[list[tuple[int, list[Likelihood]]]]:
        """See `Backend.score`; vLLM's prefix cache computes a shared prompt once."""
        if not questions:
            return
        encoded = [
            [encode_pair(self.tokenizer, prompt, text, self._leading) for text in candidates]
            for prompt, candidates in questions
        ]
        options = self._vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        flat = [candidate for candidates in encoded for candidate in candidates]
        answers = iter(self._ask([list(candidate.ids) for candidate in flat], options))
        batch = []
        for place, candidates in enumerate(encoded):
            scores = []
            for candidate in candidates:
                known = next(answers).prompt_logprobs
                tokens = range(candidate.start, len(candidate.ids))
                total = sum(float(known[at][candidate.ids[at]].logprob) for at in tokens)
                scores.append(Likelihood(total, len(tokens)))
            batch.append((place, scores))
        yield batch

    def text_losses(self, texts: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, float]]]:
        """Not offered.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("--tasks perplexity: vLLM does not measure it. Leave --backend out for this set.")

    def _ask(self, prompts: Sequence[Sequence[int]], options: Any) -> list[Any]:
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        answers: list[Any] = self._llm.generate(requests, options, lora_request=self._lora, use_tqdm=False)
        return answers


def _generation(output: Any) -> Generation:
    if output.finish_reason == "length":
        return Generation(output.text, "length", len(output.token_ids))
    reason = "stop" if isinstance(output.stop_reason, str) else "eos"
    return Generation(output.text, reason, len(output.token_ids))  # type: ignore[arg-type]
