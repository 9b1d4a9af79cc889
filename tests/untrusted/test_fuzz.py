"""Whatever is sent: it works, or one message says what is wrong, or a checkpoint is said to be unused.

Never a traceback, a crash, a hang, or more than 2 GiB.
`python -m tests.untrusted.test_fuzz SEED NUMBER [WORD]` prints all faults; with a word, of files whose path has it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.untrusted.harness import End, tried
from tests.untrusted.targets import TARGETS, Target, inputs, make_examples

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "all"
    folder.mkdir()
    make_examples(folder)
    return folder


def tried_on(target: Target, content: bytes, examples: Path, scratch: Path) -> End:
    """Read a target whose file holds something else, in a copy of the examples that has no other use."""
    folder = scratch / "copy"
    shutil.copytree(examples, folder)
    try:
        for file in ("recipe.yaml", "run/config.json", "grid.yaml"):  # paths in them are the copy's
            path = folder / file
            path.write_bytes(path.read_bytes().replace(str(examples).encode(), str(folder).encode()))
        content = content.replace(str(examples).encode(), str(folder).encode())
        target.path(folder).write_bytes(content)
        return tried(lambda: target.read(folder), LIMIT_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def faults(examples: Path, scratch: Path, seed: int, number: int) -> Iterator[tuple[int, Target, End]]:
    """Yield every input of a seed that ends as none may."""
    for index, target, content in inputs(examples, seed, number):
        end = tried_on(target, content, examples, scratch)
        if not end.is_good or (target.same and end.text not in ("step 2", "step 4")):
            yield index, target, end


def test_the_unchanged_examples_work(examples: Path, tmp_path: Path) -> None:
    """Or the tests below would mean nothing."""
    for target in {target.read: target for target in TARGETS}.values():
        end = tried_on(target, target.path(examples).read_bytes(), examples, tmp_path)
        assert end.kind == "worked", (target, end.text)


def told(seed: int, fault: tuple[int, Target, End]) -> str:
    index, target, end = fault
    return f"seed {seed}, input {index}, {target.file} read by {target.read.__name__}: {end.kind}\n{end.text[-2500:]}"


@pytest.mark.parametrize("seed", [1])
def test_changed_input(seed: int, examples: Path, tmp_path: Path) -> None:
    assert "\n\n".join(told(seed, fault) for fault in faults(examples, tmp_path, seed, 100)) == ""


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(100, 104))
def test_much_more_changed_input(seed: int, examples: Path, tmp_path: Path) -> None:
    assert "\n\n".join(told(seed, fault) for fault in faults(examples, tmp_path, seed, 1000)) == ""


def test_the_watchdog_sees_what_may_not_be() -> None:
    """A traceback, a crash, a hang, too much memory, and a message that a terminal would obey."""
    import ctypes
    import time

    from colm_ds.errors import ConfigError

    def refuse() -> str:
        raise ConfigError("no\x1b[2J. Write yes.")

    assert tried(lambda: "done", 10.0).is_good
    assert tried(refuse, 10.0).is_good
    for work in (lambda: str(1 // 0), lambda: str(ctypes.string_at(8)), lambda: str(sys.exit(3))):
        assert tried(work, 10.0).kind == "broke"
    assert tried(lambda: str(time.sleep(60)), 0.3).kind == "hung"
    assert tried(lambda: str(len(b"x" * (2 << 30))), 60.0).kind == "took too much memory"
    assert not End("said", "no\x1b[2J", 0.0, 0.0).is_good
    assert not End("said", " ", 0.0, 0.0).is_good


def main(seed: int, number: int, word: str = "") -> None:
    """Print every fault, and how many inputs ended how."""
    with tempfile.TemporaryDirectory() as scratch:
        examples = Path(scratch) / "all"
        examples.mkdir()
        make_examples(examples)
        counts: Counter[str] = Counter()
        for index, target, content in inputs(examples, seed, number, word):
            end = tried_on(target, content, examples, Path(scratch))
            good = end.is_good and not (target.same and end.text not in ("step 2", "step 4"))
            counts[end.kind if good else "FAULT"] += 1
            if not good:
                print(told(seed, (index, target, end)), flush=True)
        print(dict(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
