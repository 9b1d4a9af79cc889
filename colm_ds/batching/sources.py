"""Sources before training: their names, their numbers of examples, and which are small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from colm_ds.batching.loader import source_counts
from colm_ds.config.colm import CoLMSection
from colm_ds.errors import ConfigError
from colm_ds.selection import sees_sources, split_sources
from colm_ds.types import SourcedDataset


def small_source_ids(config: CoLMSection, source_counts: Mapping[str, int]) -> list[int]:
    """Return the ids of the sources whose examples are all kept.

    Args:
        config: `small_sources` in it is `auto` or `below_mean`, `none`, or a list of names or ids.
        source_counts: examples of every source in the dataset; ids follow its order.

    Raises:
        ConfigError: if a listed source is not in the dataset.
    """
    names = list(source_counts)
    if config.small_sources == "none":
        return []
    if config.small_sources in ("auto", "below_mean"):
        present = {name: count for name, count in source_counts.items() if count}  # data.limit may have drawn none
        return [names.index(name) for name in split_sources(present)[0]] if present else []
    # A number is a source's name if the data has one of that name, otherwise its id.
    ids = [names.index(str(source)) if str(source) in names else source for source in config.small_sources]
    unknown = [source for source in ids if not isinstance(source, int) or not 0 <= source < len(names)]
    if unknown:
        raise ConfigError(
            f"colm.small_sources: {unknown} not in the dataset. Its sources: " + ", ".join(map(repr, names)) + "."
        )
    return sorted({int(source) for source in ids})


def looks_at_sources(config: CoLMSection) -> bool:
    """Return whether the choice depends on an example's source."""
    return sees_sources(config.selector, config.outer_rules) and (config.per_source or config.small_sources != "none")


def known_counts(
    config: CoLMSection, given: Mapping[str, int] | Sequence[str] | SourcedDataset | None
) -> dict[str, int]:
    """Return the number of examples of every source, by name in the order of the ids.

    Args:
        config: says whether they are needed.
        given: the counts; names alone, each counted as 0; a dataset; or None, for one source called `all`.

    Raises:
        ConfigError: if the choice depends on more than what is given.
    """
    if isinstance(given, Mapping):
        return {str(name): int(count) for name, count in given.items()}
    if given is not None and not isinstance(given, Sequence):
        return source_counts(given)
    if given is None and looks_at_sources(config):
        raise ConfigError(
            "CoresetSelector: the sources of the dataset are not known. Give source_counts, a mapping of each name to "
            'its number of examples, or write "small_sources": "none" and "per_source": false for one pool of all.'
        )
    names = [str(name) for name in given or ["all"]]
    if config.small_sources in ("auto", "below_mean") and looks_at_sources(config):
        raise ConfigError(
            "CoresetSelector: names of sources without numbers of examples, which tell the small ones. Give "
            'source_counts as a mapping, or list the small ones as "small_sources".'
        )
    return dict.fromkeys(names, 0)
