"""Tabulate a token store: documents, tokens and chunks of each source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from colm_ds.data.pretraining.chunks import ChunkDataset
from colm_ds.data.pretraining.token_store import HELDOUT, TRAIN, TokenStore
from colm_ds.selection import split_sources


def table_rows(store: TokenStore, chunk_tokens: int, weights: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """Count documents, tokens and chunks by source, and each source's share of the mixture's chunks.

    Args:
        store: a finished store.
        chunk_tokens: tokens of a chunk.
        weights: shares of the sources; None: natural proportions.
    """
    train = ChunkDataset(store, TRAIN, chunk_tokens, weights)
    held = ChunkDataset(store, HELDOUT, chunk_tokens, weights)
    small = split_sources(train.mixture_counts)[0]
    rows = []
    for number, name in enumerate(train.source_names):
        facts = store.manifest["sources"][name]
        rows.append(
            {
                "source": name,
                "documents": facts[TRAIN]["documents"],
                "text_mb": facts[TRAIN]["text_bytes"] / 1e6,
                "tokens": facts[TRAIN]["tokens"],
                "chunks": train.sizes[number],
                "natural_share": train.sizes[number] / len(train),
                "mixture_chunks": train.mixture_counts[name],
                "mixture_share": train.mixture_counts[name] / sum(train.mixture_counts.values()),
                "small": name in small,
                "heldout_documents": facts[HELDOUT]["documents"],
                "heldout_tokens": facts[HELDOUT]["tokens"],
                "heldout_chunks": held.sizes[number],
            }
        )
    return rows


def format_table(store: TokenStore, chunk_tokens: int, weights: Mapping[str, float] | None) -> str:
    """Format `table_rows` as Markdown, with totals and what was left out."""
    rows = table_rows(store, chunk_tokens, weights)
    head = [
        "source",
        "documents",
        "text MB",
        "tokens",
        "chunks",
        "share",
        "in the mixture",
        "share",
        "held-out documents",
    ]
    lines = ["| " + " | ".join([*head, "tokens", "chunks"]) + " |", "|---" + "|---:" * (len(head) + 1) + "|"]
    summed = ("documents", "text_mb", "tokens", "chunks", "mixture_chunks", "heldout_documents", "heldout_tokens")
    total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in (*summed, "heldout_chunks")}
    total |= {"source": "all", "natural_share": 1.0, "mixture_share": 1.0, "small": False}
    for row in [*rows, total]:
        cells = [
            row["source"] + (" (small)" if row["small"] else ""),
            f"{row['documents']:,}",
            f"{row['text_mb']:,.1f}",
            f"{row['tokens']:,}",
            f"{row['chunks']:,}",
            f"{row['natural_share']:.1%}",
            f"{row['mixture_chunks']:,}",
            f"{row['mixture_share']:.1%}",
            *(f"{row[key]:,}" for key in ("heldout_documents", "heldout_tokens", "heldout_chunks")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    bad = store.manifest["bad_lines"]
    left = ", ".join(f"{name} ({counts['documents']:,})" for name, counts in store.manifest["left_out"].items())
    lines += [
        "",
        f"Chunks of {chunk_tokens} tokens, vocabulary of {store.manifest['vocabulary_size']:,}. Small: fewer ",
    ]
    lines[-1] += f"than |V|/c chunks of the mixture. Bad lines: {bad['count']:,} of {bad['of']:,}."
    lines[-1] += f" Sources left out (documents): {left}." if left else ""
    return "\n".join(lines)
