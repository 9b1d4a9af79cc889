"""Ask whether the Hugging Face hub can be reached, within seconds, where a library would retry for a minute."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Literal

TIMEOUT_S = 5.0
"""Seconds that the hub has to take a connection; more if `HF_HUB_ETAG_TIMEOUT` grants more."""

_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json")
"""Files of a model or tokenizer, one of which is in the cache if it was loaded before."""


@cache
def why_not_there(name: str, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Return why a name of the hub cannot be loaded; None if it may be: found there, or in the cache.

    Args:
        name: such as `HuggingFaceTB/SmolLM2-135M-Instruct`.
        kind: what it names.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    if Path(name).exists() or _is_cached(name, kind):
        return None
    api, granted = HfApi(), constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else 0
    try:
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=max(TIMEOUT_S, granted))
    except RepositoryNotFoundError:
        return f"the Hugging Face hub has no {kind} of this name, or not for you (hf auth login)"
    except OfflineModeIsEnabled:
        return "not in the cache, and the Hugging Face hub is switched off by HF_HUB_OFFLINE"
    except (HfHubHTTPError, HFValidationError):
        return None  # it answers, or is not asked: the library will say what is wrong
    except Exception as error:  # the classes of a failed connection are those of the library's HTTP client
        kinds = [each.__name__ for each in type(error).__mro__]
        if any("Timeout" in name for name in kinds) and not any("Connect" in name for name in kinds):
            return None  # it is there, and slow: the library waits longer
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return f"not in the cache, and the Hugging Face hub cannot be reached ({reason})"
    return None


def _is_cached(name: str, kind: str) -> bool:
    if kind == "dataset":
        from datasets import config
        from datasets.naming import camelcase_to_snakecase

        *owner, own = name.split("/")
        return (Path(config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(own)])).is_dir()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES)
    except HFValidationError:
        return False
