"""Choose a coreset of a large batch: sources and quotas, Adam geometry, masks, medoids, weights. Needs torch only."""

from colm_ds.selection.coreset import SelectionSettings, Signals, select_coreset
from colm_ds.selection.exchange import SINGLE_PROCESS, ByteCount, Exchange, SingleProcess
from colm_ds.selection.facility_location import Medoids, facility_location, pairwise_similarity
from colm_ds.selection.gradients import DenseGradients, Gradients, LowRankGradients, finite_rows
from colm_ds.selection.history import AdamHistory
from colm_ds.selection.mask import mask_coordinates
from colm_ds.selection.pools import Picks, PoolExamples, PoolSelector
from colm_ds.selection.registry import (
    SELECTORS,
    Needs,
    make_selector,
    needs_of,
    sees_sources,
    signal_of,
    takes_outer_rules,
    which_selector,
    wrong_options,
)
from colm_ds.selection.selectors import Selector, SelectorContext, StatelessSelector
from colm_ds.selection.sources import coreset_quotas, share_out, split_sources
from colm_ds.selection.weights import cluster_weights, matched_weights

__all__ = [
    "SELECTORS",
    "SINGLE_PROCESS",
    "AdamHistory",
    "ByteCount",
    "DenseGradients",
    "Exchange",
    "Gradients",
    "LowRankGradients",
    "Medoids",
    "Needs",
    "Picks",
    "PoolExamples",
    "PoolSelector",
    "SelectionSettings",
    "Selector",
    "SelectorContext",
    "Signals",
    "SingleProcess",
    "StatelessSelector",
    "cluster_weights",
    "coreset_quotas",
    "facility_location",
    "finite_rows",
    "make_selector",
    "mask_coordinates",
    "matched_weights",
    "needs_of",
    "pairwise_similarity",
    "sees_sources",
    "select_coreset",
    "share_out",
    "signal_of",
    "split_sources",
    "takes_outer_rules",
    "which_selector",
    "wrong_options",
]
