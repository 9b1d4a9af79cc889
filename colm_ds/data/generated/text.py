"""Generated text of five kinds in the Pile's format, of any size, for demos, tests and benchmarks without a download.

Run: python -m colm_ds.data.generated.text FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from colm_ds.run_folder.files import replacing

_SYLLABLES = (
    "ba",
    "cor",
    "de",
    "fil",
    "gan",
    "ho",
    "in",
    "jur",
    "ka",
    "lem",
    "mo",
    "nus",
    "or",
    "pel",
    "qui",
    "ras",
    "ten",
)
_POOL = 1500
"""Number of different sentences of a kind."""

SHARES = {
    "generated/parliament": 2.8,
    "generated/code": 28.2,
    "generated/comments": 5.0,
    "generated/abstracts": 3.4,
    "generated/articles": 60.6,
}
"""Sources and their shares of the bytes in percent, those of the paper's five."""


def _words(rng: random.Random, count: int, low: int, high: int) -> list[str]:
    return ["".join(rng.choices(_SYLLABLES, k=rng.randint(low, high))) for _ in range(count)]


def _pick(rng: random.Random, words: Sequence[str]) -> str:
    """Draw a word by about Zipf's law."""
    return words[int(len(words) ** rng.random()) - 1]


def _parliament(rng: random.Random, words: Sequence[str]) -> str:
    verb, noun = rng.choice(("supports", "regrets", "welcomes")), _pick(rng, words)
    return f"Mr President, the committee on {noun} {verb} the report on {_pick(rng, words)} and {_pick(rng, words)}."


def _code(rng: random.Random, words: Sequence[str]) -> str:
    name, value, number = _pick(rng, words), _pick(rng, words), rng.randint(0, 9)
    return f"def {name}({value}):\n    if {value} > {number}:\n        return {value} + {number}\n    return {name}"


def _comment(rng: random.Random, words: Sequence[str]) -> str:
    return (
        f"I tried {_pick(rng, words)} with {_pick(rng, words)}, and it is {rng.choice(('great', 'slow', 'fine'))} imo."
    )


def _abstract(rng: random.Random, words: Sequence[str]) -> str:
    aim, what = rng.choice(("Aim", "Methods", "Results")), _pick(rng, words)
    return (
        f"{aim}: {what} was measured in {rng.randint(10, 99)} patients with {_pick(rng, words)} ({_pick(rng, words)})."
    )


def _article(rng: random.Random, words: Sequence[str]) -> str:
    name, place = _pick(rng, words).title(), _pick(rng, words).title()
    return f"{name} is a {_pick(rng, words)} in {place}, known for {_pick(rng, words)}."


_KINDS: dict[str, tuple[Callable[[random.Random, Sequence[str]], str], str, tuple[int, int]]] = {
    "generated/parliament": (_parliament, " ", (5, 40)),
    "generated/code": (_code, "\n\n", (5, 60)),
    "generated/comments": (_comment, " ", (1, 12)),
    "generated/abstracts": (_abstract, " ", (6, 20)),
    "generated/articles": (_article, " ", (5, 60)),
}


def documents_of(source: str, seed: int = 0) -> Iterator[str]:
    """Yield documents of one source without end; same arguments, same documents."""
    write, joint, (fewest, most) = _KINDS[source]
    rng = random.Random(f"{seed} {source}")
    words = _words(rng, 400, 1, 4)
    pool = [write(rng, words) for _ in range(_POOL)]
    while True:
        yield joint.join(rng.choices(pool, k=rng.randint(fewest, most)))


def write_text(folder: str | Path, megabytes: float = 2.0, seed: int = 0, files_per_source: int = 1) -> dict[str, int]:
    """Write `NAME_0.jsonl`, ... for every source, about `megabytes` of text in all.

    Args:
        folder: folder to write, made if missing; files of an earlier call are replaced.
        megabytes: of text, 10^6 bytes each.
        seed: seed of the text.
        files_per_source: files that each source is spread over.

    Returns:
        Bytes of text by source.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for source, share in SHARES.items():
        wanted, size, number = megabytes * 1e6 * share / sum(SHARES.values()), 0, 0
        texts = documents_of(source, seed)
        for file in range(files_per_source):
            path = folder / f"{source.rpartition('/')[2]}_{file}.jsonl"
            with replacing(path, sync=False) as lines:
                while size < wanted * (file + 1) / files_per_source:
                    text = f"{next(texts)} [{number}]"  # no two are equal
                    lines.write(json.dumps({"text": text, "meta": {"pile_set_name": source}}) + "\n")
                    size, number = size + len(text), number + 1
        written[source] = size
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `write_text` from the command line."""
    parser = argparse.ArgumentParser(prog="python -m colm_ds.data.generated.text", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--megabytes", type=float, default=2.0, help="megabytes of text (2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text (0)")
    options = parser.parse_args(arguments)
    for source, size in write_text(options.folder, options.megabytes, options.seed).items():
        print(f"{size / 1e6:8.2f} MB  {source}")


if __name__ == "__main__":
    main()
