"""The code reads as a native reader of the field would write it: docstring openings, stock phrases, names.

To forbid another opening, phrase or name, add it to `OPENINGS`, `PHRASES` or `NAMES`. To see the places alone:
`python -m tests.test_language`.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["colm_ds", "finetune", "pretrain", "benchmarks", "launch"]
TEXTS = {".py", ".sh", ".yaml", ".md"}
LIMIT = 20

# Being rewritten elsewhere; take a room off this list once it is done.
EXEMPT: list[str] = []

OPENINGS = {"What", "Whether", "How", "Why", "Where", "If"}  # a docstring opens with a verb or a noun instead
PHRASES = {
    "cannot": r"\bcan not\b(?! only)",
    "resume, continue": r"\b(go|goes|going|went|gone) on\b",
    "again, from scratch": r"\banew\b",
}
# As in the source, where quotes, an f and line breaks may come between two words.
MAY_HOLD_PHRASE = re.compile("|".join(PHRASES.values()).replace(" ", r"\W+(?:[rf]\W+)?"), re.IGNORECASE)
NAMES = {"found", "anew"}  # name what the variable holds: lengths, matches, entry

# Words that add nothing to an argument's name: `rank: this rank.`, `batch: the given batch.`
FILLERS = {"a", "all", "an", "be", "for", "given", "in", "is", "it", "its", "of", "our", "that", "the", "this", "to"}
ENTRY = re.compile(r"^ {4}\*{0,2}(\w+)(?: \([^)]*\))?: (.+(?:\n {5,}.+)*)", re.MULTILINE)
ARGS = re.compile(r"^Args:\n((?: {4}.*\n?|\n)+)", re.MULTILINE)


@dataclass(frozen=True, order=True)
class Place:
    """A place to reword; `line` is 1-based."""

    path: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.text}"


def repeats_names(docstring: str) -> bool:
    """Return whether there is an `Args:` section in which every description only repeats its argument's name."""
    section = ARGS.search(docstring + "\n")
    entries = ENTRY.findall(section.group(1)) if section else []
    return bool(entries) and all(words(description) <= words(name) for name, description in entries)


def words(text: str) -> set[str]:
    """Split a name or a sentence into words, lower-case, without plurals and fillers."""
    every = re.findall(r"[a-z0-9]+", text.lower())
    return {word.removesuffix("s") for word in every if word not in FILLERS}


def docstring_places(nodes: list[ast.AST], path: str) -> Iterator[Place]:
    """List docstrings that open with one of `OPENINGS`, and empty `Args:` sections."""
    for node in nodes:
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        line = node.body[0].lineno
        first = docstring.split("\n")[0]
        if re.split(r"\W", first)[0] in OPENINGS:
            yield Place(path, line, "open with a verb", first)
        if repeats_names(docstring):
            yield Place(path, line, "leave out Args:", first)


def name_places(nodes: list[ast.AST], path: str) -> Iterator[Place]:
    """List assignments, arguments and fields named as one of `NAMES`."""
    for node in nodes:
        stored = isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store)
        name = node.arg if isinstance(node, ast.arg) else getattr(node, "id", getattr(node, "attr", None))
        if name in NAMES and (stored or isinstance(node, ast.arg)):
            yield Place(path, node.lineno, "name what it holds", name)


def prose(source: str, nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield the strings and the blocks of comments of a module, each with its first line's number.

    Parts of one string are joined first, so that a phrase broken between them is seen.
    """
    inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value

    start, last, block = 0, -1, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield start, block
                start, block = token.start[0], ""
            last, block = token.start[0], block + token.string.lstrip("# ") + "\n"
    yield start, block


def phrase_places(texts: Iterator[tuple[int, str]], path: str) -> Iterator[Place]:
    """List the uses of `PHRASES`, also those broken between two lines."""
    for first, text in texts:
        for better, phrase in PHRASES.items():
            for match in re.finditer(phrase.replace(" ", r"\s+(?:#\s*)?"), text, re.IGNORECASE):
                begin = text.rfind("\n", 0, match.start()) + 1
                end = text.find("\n", match.end())
                line = text[begin : end if end >= 0 else None].replace("\n", " ").strip()
                yield Place(path, first + text.count("\n", 0, match.start()), better, line)


def places(root: Path = ROOT, exempt: tuple[str, ...] = tuple(EXEMPT)) -> list[Place]:
    """List all places to reword in `ROOMS`, in order of path and line."""
    listed: list[Place] = []
    for file in sorted(file for room in ROOMS for file in (root / room).rglob("*") if file.suffix in TEXTS):
        path = file.relative_to(root).as_posix()
        if path.startswith(exempt) or "/runs/" in path:
            continue
        source = file.read_text(encoding="utf-8")
        if file.suffix != ".py":
            listed += phrase_places(iter([(1, source)]), path)
            continue
        nodes = list(ast.walk(ast.parse(source)))
        listed += [*docstring_places(nodes, path), *name_places(nodes, path)]
        if MAY_HOLD_PHRASE.search(source):  # tokenising takes most of the time
            listed += phrase_places(prose(source, nodes), path)
    return sorted(listed)


def test_few_places_have_to_be_translated_back() -> None:
    listed = places()
    print(*listed, sep="\n")
    assert len(listed) <= LIMIT, "\n".join([f"{len(listed)} places to reword, at most {LIMIT}:", *map(str, listed)])


def test_every_exempt_room_exists() -> None:
    assert [room for room in EXEMPT if not (ROOT / room).exists()] == []


def test_each_kind_is_seen(tmp_path: Path) -> None:
    (tmp_path / "colm_ds").mkdir()
    (tmp_path / "colm_ds" / "sample.py").write_text(
        '"""What it is."""\n'
        "\n"
        "\n"
        "def run(rank, found=1):\n"
        '    """Run.\n'
        "\n"
        "    Args:\n"
        "        rank: this rank.\n"
        "        found: the found.\n"
        '    """\n'
        "    # it can\n"
        "    # not be\n"
        '    raise ValueError("it goes " f"on {rank} anew")\n',
        encoding="utf-8",
    )
    (tmp_path / "colm_ds" / "run.sh").write_text("# can\n# not\n", encoding="utf-8")
    assert [(place.path, place.line, place.kind) for place in places(tmp_path)] == [
        ("colm_ds/run.sh", 1, "cannot"),
        ("colm_ds/sample.py", 1, "open with a verb"),
        ("colm_ds/sample.py", 4, "name what it holds"),
        ("colm_ds/sample.py", 5, "leave out Args:"),
        ("colm_ds/sample.py", 11, "cannot"),
        ("colm_ds/sample.py", 13, "again, from scratch"),
        ("colm_ds/sample.py", 13, "resume, continue"),
    ]


def test_descriptions_that_say_more_are_left_alone() -> None:
    assert repeats_names("Run.\n\nArgs:\n    rank: this rank.\n    num_ranks: the ranks.\n")
    assert not repeats_names("Run.\n\nArgs:\n    rank: this rank.\n    counts: examples of each source, `[n]`.\n")
    assert not repeats_names("Return the rank.")


if __name__ == "__main__":
    listed = places()
    print(*listed, sep="\n")
    print(len(listed), "places:", dict(Counter(place.kind for place in listed)))
