"""Which sequences go through the model for the candidates of a classification example."""

from __future__ import annotations

from collections.abc import Sequence


def computed_rows(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Candidates whose sequence, less its last token, begins no other one: all others find their predictions there.

    Nothing is predicted from a last token, and what is predicted behind a token depends on those up to it alone. So
    candidates of one token share the pass through their prompt.

    Args:
        sequences: tokens of the prompt with every candidate, each at least two.

    Returns:
        The candidates whose sequence is computed, in order, and for every candidate the place of its row among these.
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
