"""Training data with sources: reading, prompts, tokens, clusters and held-out parts."""

from colm_ds.batching.collate import length_sorted_batches, pad_batch, padding_fraction
from colm_ds.batching.mixture import MixtureSampler
from colm_ds.data.entries import DataEntry
from colm_ds.data.examples import load_examples
from colm_ds.data.formats import find_files, read_records
from colm_ds.data.holdout import split_holdout
from colm_ds.data.prompt import encode_example, encode_examples, encode_prompt, format_prompt
from colm_ds.data.token_dataset import TokenDataset

__all__ = [
    "DataEntry",
    "MixtureSampler",
    "TokenDataset",
    "encode_example",
    "encode_examples",
    "encode_prompt",
    "find_files",
    "format_prompt",
    "length_sorted_batches",
    "load_examples",
    "pad_batch",
    "padding_fraction",
    "read_records",
    "split_holdout",
]
