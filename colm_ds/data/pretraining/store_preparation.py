"""Prepare a token store from files in the Pile's format: scan, train a tokenizer, tokenise, write a manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from colm_ds.data.formats import LINES, find_files
from colm_ds.data.pretraining.chunks import CACHE
from colm_ds.data.pretraining.part_pool import map_parts
from colm_ds.data.pretraining.pile import PART_BYTES, BadLine, Part, documents, total_bytes
from colm_ds.data.pretraining.scan import (
    Scan,
    ScanSettings,
    all_parts,
    check_bad_lines,
    check_heldout,
    check_sources,
    scan,
)
from colm_ds.data.pretraining.sentencepiece_model import load_sentencepiece, train_sentencepiece
from colm_ds.data.pretraining.token_store import (
    HELDOUT,
    MANIFEST,
    MOST_BYTES,
    PARTS,
    TOKENIZER,
    TRAIN,
    TokenStore,
    read_part,
    token_dtype,
    write_part,
)
from colm_ds.data.prompt import leading_special_ids
from colm_ds.data.token_cache import describe_tokenizer
from colm_ds.errors import Attempts, CoLMError, ConfigError, DataError
from colm_ds.models.families import read_tokenizer, set_pad_token
from colm_ds.process.progress import Progress
from colm_ds.run_folder.contents import LOCK
from colm_ds.run_folder.files import read_object, write_whole
from colm_ds.run_folder.lock import RunLock
from colm_ds.untrusted.json_text import read_json

FORMAT_VERSION = 1
_SETTINGS, _SCAN = "settings.json", "scan.json"
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Preparation:
    """Definition of a store to prepare.

    Attributes:
        files: in the Pile's format, `.jsonl`, `.jsonl.gz` or `.jsonl.zst`; files and folders.
        folder: folder of the store.
        tokenizer: SentencePiece `.model`, Hugging Face folder or hub name; None trains one.
        vocabulary_size: size of a newly trained tokenizer.
        weights: shares of the sources; None takes all sources in their natural proportions.
        skip_others: leave out documents of sources without a weight.
        holdout: share of every source's documents to hold out.
        max_bad_fraction: share of bad lines to tolerate.
        sample_mb: megabytes of text to train a tokenizer on.
        seed: decides which documents are held out and sampled.
        part_bytes: see `read_parts`.
    """

    files: Sequence[str | Path]
    folder: Path
    tokenizer: str | None = None
    vocabulary_size: int = 32000
    weights: Mapping[str, float] | None = None
    skip_others: bool = False
    holdout: float = 0.01
    max_bad_fraction: float = 1e-4
    sample_mb: float = 32.0
    seed: int = 0
    part_bytes: int = PART_BYTES


def prepare(
    wanted: Preparation, num_processes: int = 1, *, overwrite: bool = False, say: Callable[[str], None] = print
) -> TokenStore:
    """Prepare a store, or resume an unfinished preparation; the result is the same.

    Args:
        wanted: the store to prepare.
        num_processes: processes that tokenise; memory grows with it, not with the files.
        overwrite: remove what another preparation left in the folder; other files stay.
        say: called with each line of progress.

    Raises:
        ConfigError: if the folder holds other files, another process prepares it, or the tokenizer cannot be used.
        DataError: for files that cannot be read, too many bad lines, unknown sources, or files that changed.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the work
    files = find_files([Path(file) for file in wanted.files])
    if others := [file for file in files if not file.name.endswith(LINES)]:
        raise DataError(
            f"{others[0]}: not read here. Write one document a line, as a JSON object, in {', '.join(LINES[:-1])} or "
            f"{LINES[-1]} files, and name those if there are others beside them."
        )
    _given_tokenizer.cache_clear()  # an earlier preparation of this process may have written others there
    settings = _settings(wanted, files)
    _refuse_foreign(wanted.folder)
    is_finished = (wanted.folder / MANIFEST).exists() and not overwrite  # only read, perhaps from a read-only disk
    with nullcontext() if is_finished else _held(wanted.folder):
        _claim(wanted.folder, settings, overwrite)
        contents = _scan_or_resume(wanted, files, num_processes, say)
        check_sources(contents, None if wanted.weights is None else list(wanted.weights), wanted.skip_others)
        if (wanted.folder / MANIFEST).exists():
            store = TokenStore(wanted.folder)
            if problem := store.why_not_whole():
                raise DataError(f"{problem}. Prepare it again with --overwrite.")
            say(f"{wanted.folder}: already finished")
            return store
        _tokenise(wanted, files, contents, num_processes, say)
        _finish(wanted, contents)
        return TokenStore(wanted.folder)


def _refuse_foreign(folder: Path) -> None:
    """Raise a ConfigError if the folder holds files and is no store."""
    settings, parts = folder / _SETTINGS, folder / PARTS
    others = [path for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []
    if all(path.match(f".{_SETTINGS}.*") or (path == parts and not any(path.iterdir())) for path in others):
        return  # empty, or a process was killed as it began there
    is_store = {"version", "files", "part_bytes"} <= read_object(settings).keys()
    is_broken = settings.exists() and parts.is_dir() and not read_object(settings)
    if not is_store and not is_broken:
        raise ConfigError(f"{folder}: holds other files. Choose an empty or new folder.")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other processes from preparing the folder."""
    lock = RunLock(folder, "data.store =", "a store")
    try:
        yield
    finally:
        lock.release()


def _remove_store(folder: Path) -> None:
    """Remove what preparations and trainings wrote into the folder; other files stay."""
    for name in (MANIFEST, _SCAN, _SETTINGS):  # the manifest first: half a store is none
        (folder / name).unlink(missing_ok=True)
    for name in (PARTS, TOKENIZER, CACHE):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)


def _claim(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Take over the folder for this preparation, or refuse it."""
    path = folder / _SETTINGS
    if overwrite:
        _remove_store(folder)
    if path.exists():
        before = _own_json(path)
        differences = [
            f"{key}: {before.get(key)!r} there, {settings.get(key)!r} here"
            for key in {**before, **settings}
            if before.get(key) != settings.get(key)
        ]
        if differences:
            raise ConfigError(
                f"{folder}: was prepared with other settings.\n  " + "\n  ".join(differences) + "\n  "
                "Choose another folder (data.store), or prepare it again with --overwrite."
            )
        for left in () if (folder / MANIFEST).exists() else folder.rglob(".*.[0-9]*"):
            if left.is_file():
                left.unlink(missing_ok=True)  # of a run that was killed
        return
    (folder / PARTS).mkdir(exist_ok=True)
    write_whole(path, (json.dumps(settings, indent=1) + "\n").encode())


def _own_json(path: Path) -> dict[str, Any]:
    """Read an object that an earlier preparation wrote."""
    try:
        content = read_json(path, most_bytes=MOST_BYTES)
        if isinstance(content, dict):
            return content
        reason = "not an object"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise DataError(f"{path}: not readable: {reason}. Prepare the data again with --overwrite.")


def _settings(wanted: Preparation, files: Sequence[Path]) -> dict[str, Any]:
    """Return every setting that decides what the store holds, as JSON."""
    given = asdict(wanted)
    del given["files"], given["folder"]
    if wanted.tokenizer is not None:
        del given["vocabulary_size"], given["sample_mb"]
        given["tokenizer"] = describe_tokenizer(_given_tokenizer(wanted.tokenizer))
        given["weights"] = sorted(wanted.weights) if wanted.weights else None
    inputs = [[file.name, file.stat().st_size] for file in files]
    return json.loads(json.dumps({"version": FORMAT_VERSION, **given, "files": inputs}))


def _scan_or_resume(wanted: Preparation, files: Sequence[Path], num_processes: int, say: Callable[[str], None]) -> Scan:
    """Scan the files and get the tokenizer, or read the result of an earlier, finished scan."""
    path = wanted.folder / _SCAN
    if path.exists():
        return Scan(**_own_json(path))
    if wanted.weights is None:
        keys, budgets = None, {"": wanted.sample_mb * 1e6}
    else:
        total = sum(wanted.weights.values())
        keys = {name: name for name in wanted.weights}
        budgets = {name: wanted.sample_mb * 1e6 * weight / total for name, weight in wanted.weights.items()}
    if wanted.tokenizer is not None:
        keys, budgets = {}, {}
    settings = ScanSettings(wanted.seed, wanted.holdout, keys)
    with _progress("scan", total_bytes(files)) as on_read:
        contents, texts = scan(files, settings, budgets, num_processes, wanted.part_bytes, on_read)
    for message in contents.bad:
        say(f"bad line: {message}")
    if contents.num_bad:
        say(f"{contents.num_bad:,} bad lines of {contents.num_lines:,}")
    attempts, names = Attempts("the files"), None if wanted.weights is None else list(wanted.weights)
    attempts.of(lambda: check_sources(contents, names, wanted.skip_others))
    attempts.of(lambda: check_bad_lines(contents, wanted.max_bad_fraction))
    attempts.of(lambda: check_heldout(contents, _used(wanted, contents), wanted.holdout))
    folder = wanted.folder / TOKENIZER
    try:
        attempts.raise_if_any()
        tokenizer = None if wanted.tokenizer is None else _given_tokenizer(wanted.tokenizer)
        shutil.rmtree(folder, ignore_errors=True)
        if tokenizer is None:
            megabytes = sum(len(text.encode()) for text in texts) / 1e6
            say(f"training a tokenizer of {wanted.vocabulary_size:,} on {megabytes:.1f} MB")
            folder.mkdir()
            write_whole(folder / "sentencepiece.model", train_sentencepiece(iter(texts), wanted.vocabulary_size))
            tokenizer = load_sentencepiece(folder / "sentencepiece.model")
    except CoLMError:  # nothing was made of the files yet: other settings are no reason to start over
        for made in (PARTS, TOKENIZER):
            shutil.rmtree(wanted.folder / made, ignore_errors=True)
        (wanted.folder / _SETTINGS).unlink(missing_ok=True)
        raise
    tokenizer.save_pretrained(str(folder))
    _given_tokenizer.cache_clear()
    write_whole(path, (json.dumps(asdict(contents), ensure_ascii=False) + "\n").encode())
    return contents


def _used(wanted: Preparation, contents: Scan) -> list[str]:
    """Return the sources that go into the store."""
    return [name for name in contents.sources if wanted.weights is None or name in wanted.weights]


@lru_cache(maxsize=4)
def _given_tokenizer(place: str) -> Any:
    """Load a tokenizer from a `.model` file, a folder or the hub."""
    if place.endswith(".model"):
        return load_sentencepiece(Path(place))
    try:
        tokenizer = read_tokenizer(place)
    except Exception as error:  # whatever a library makes of a broken file
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"tokenizer {place!r} cannot be loaded: {reason} Name a folder or a .model file.") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {place!r} has no eos token, which marks the end of a document.")
    set_pad_token(tokenizer)  # as training does, so that both describe the same tokenizer
    return tokenizer


def _tokenise(
    wanted: Preparation, files: Sequence[Path], contents: Scan, num_processes: int, say: Callable[[str], None]
) -> None:
    parts = wanted.folder / PARTS
    names = {(part["file"], part["number"]): (_name(n), part["digest"]) for n, part in enumerate(contents.parts)}
    missing = {key: names[key] for key in names if read_part(parts, names[key][0], verify=True) is None}
    if len(missing) < len(names):
        say(f"{len(names) - len(missing)} of {len(names)} parts exist already")
    _given_tokenizer(str(wanted.folder / TOKENIZER))  # loaded once, before the processes start
    only = frozenset(file for file, _ in missing)
    with _progress("tokenise", total_bytes([files[number] for number in sorted(only)])) as on_read:
        items = (
            (part, *missing[part.key])
            for part in all_parts(files, wanted.part_bytes, on_read, only)
            if part.key in missing
        )
        work = partial(tokenise_part, wanted, frozenset(_used(wanted, contents)))
        done = sum(1 for _ in map_parts(work, items, num_processes))
    if done < len(missing):
        raise DataError(f"{wanted.folder}: files have become shorter since they were scanned. Use --overwrite.")


def tokenise_part(wanted: Preparation, sources: frozenset[str], item: tuple[Part, str, str]) -> None:
    """Write the tokens of one part.

    Args:
        wanted: the store to prepare.
        sources: sources whose documents to keep.
        item: the part, its name, and its digest from the scan.
    """
    part, name, digest = item
    if part.digest() != digest:
        raise DataError(f"{part.path}: has changed since it was scanned. Prepare it again with --overwrite.")
    tokenizer = _given_tokenizer(str(wanted.folder / TOKENIZER))
    dtype = token_dtype(len(tokenizer))
    leading, eos = leading_special_ids(tokenizer), tokenizer.eos_token_id
    tokens: dict[tuple[str, str], list[np.ndarray]] = {}
    counts: dict[tuple[str, str], list[int]] = {}
    kept = (d for d in documents(part, wanted.seed) if not isinstance(d, BadLine) and d.source in sources)
    for batch in _batches(kept):
        texts = [document.text for document in batch]
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for document, ids in zip(batch, encoded, strict=True):
            key = (HELDOUT if document.place < wanted.holdout else TRAIN), document.source
            tokens.setdefault(key, []).append(np.array([*leading, *ids, eos], dtype=dtype))
            count = counts.setdefault(key, [0, 0])
            count[0] += 1
            count[1] += document.num_bytes
    joined = {key: np.concatenate(pieces) for key, pieces in tokens.items()}
    facts = [
        {
            "split": split,
            "source": source,
            "documents": counts[split, source][0],
            "text_bytes": counts[split, source][1],
        }
        for split, source in sorted(counts)
    ]
    write_part(wanted.folder / PARTS, name, joined, dtype, {"counts": facts})


def _batches(kept: Iterator[Any]) -> Iterator[list[Any]]:
    """Yield the documents for one call of the tokenizer at a time."""
    batch: list[Any] = []
    size = 0
    for document in kept:
        batch.append(document)
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _finish(wanted: Preparation, contents: Scan) -> None:
    """Write the manifest, which completes the store."""
    tokenizer = _given_tokenizer(str(wanted.folder / TOKENIZER))
    zero = {"documents": 0, "text_bytes": 0, "tokens": 0}
    sources = {name: {TRAIN: dict(zero), HELDOUT: dict(zero)} for name in _used(wanted, contents)}
    parts = []
    for number in range(len(contents.parts)):
        meta = read_part(wanted.folder / PARTS, _name(number))
        assert meta is not None
        parts.append({"name": _name(number), **{key: meta[key] for key in ("bytes", "checksum", "segments")}})
        for counted in (*meta["segments"], *meta["counts"]):
            total = sources[counted["source"]][counted["split"]]
            for key in zero.keys() & counted.keys():
                total[key] += counted[key]
    manifest = {
        "version": FORMAT_VERSION,
        "settings": _own_json(wanted.folder / _SETTINGS),
        "dtype": token_dtype(len(tokenizer)),
        "vocabulary_size": len(tokenizer),
        "tokenizer": describe_tokenizer(tokenizer),
        "sources": sources,
        "left_out": {name: counts for name, counts in contents.sources.items() if name not in sources},
        "bad_lines": {"count": contents.num_bad, "of": contents.num_lines, "first": contents.bad},
        "parts": parts,
    }
    write_whole(wanted.folder / MANIFEST, (json.dumps(manifest, ensure_ascii=False) + "\n").encode())


def _name(number: int) -> str:
    return f"{number:06d}"


@contextmanager
def _progress(what: str, num_bytes: int) -> Iterator[Callable[[int, int], object]]:
    """Show how many bytes of the files are read."""
    with Progress(what, num_bytes, "bytes") as bar:
        read: dict[int, int] = {}

        def on_read(file: int, place: int) -> None:
            bar.advance(place - read.get(file, 0))
            read[file] = place

        yield on_read
