"""Choose the sequences to pass through the model for the candidates of a classification example."""

from __future__ import annotations

from collections.abc import Sequence


def computed_rows(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return the candidates whose sequence, less its last token, is no prefix of another; the others share its row.

    Nothing is predicted from a last token, and each prediction depends only on the tokens before it. So candidates of
    one token share the pass through their prompt.

    Args:
        sequences: tokens of the prompt with every candidate, each at least two.

    Returns:
        The candidates whose sequence is computed, in order, and for every candidate the index of its row among these.
    """
    fronts = [list(sequence[:-1]) for sequence in sequences]
    owner = []
    for number, front in enumerate(fronts):
        longer = [
            other
            for other, candidate in enumerate(fronts)
            if candidate[: len(front)] == front and (len(candidate) > len(front) or other <= number)
        ]
        owner.append(min(longer, key=lambda other: (-len(fronts[other]), other)))
    kept = sorted(set(owner))
    return kept, [kept.index(each) for each in owner]
