"""SentencePiece models: train one, and read a `.model` file as a Hugging Face tokenizer that gives the same ids."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colm_ds.errors import ConfigError, DataError

PAD = "<pad>"
_LONGEST_LINE_BYTES = 16384
_PROBE = ("Hello  world", " a\n\tb = 1234;\r\n", "naïve 中文 🙂 x²", "", "don't 3.14")


def train_sentencepiece(texts: Iterator[str], vocabulary_size: int) -> bytes:
    """Train a byte-pair model as Llama's: byte fallback, single digits, text unnormalised, `<unk> <s> </s> <pad>`.

    The same texts in the same order give the same bytes.

    Args:
        texts: documents; their lines are the sentences.
        vocabulary_size: pieces, special ones and the 256 bytes included.

    Returns:
        The content of a `.model` file.

    Raises:
        DataError: if the texts have too few different pieces for the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_LONGEST_LINE_BYTES,
            pad_id=3,
            pad_piece=PAD,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        why = f"its characters alone need {needed.group(1)}" if needed else str(error)
        advice = f"Choose at least {needed.group(1)}" if needed else "Choose a smaller one"
        raise DataError(f"a vocabulary of {vocabulary_size} cannot be trained on this text: {why}. {advice}.") from None
    return model.getvalue()


def _lines(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            if line and "\0" not in line and len(line.encode()) <= _LONGEST_LINE_BYTES:
                yield line


def load_sentencepiece(path: Path) -> Any:
    """Return a fast Hugging Face tokenizer with the ids of a SentencePiece `.model` file; it adds none by itself.

    transformers converts the file; on a few texts the ids are compared with SentencePiece's. A text that spells a
    control piece, such as "</s>", may become that piece under a unigram model, where SentencePiece would cut it up.

    Raises:
        ConfigError: if the file cannot be read, has no end-of-sequence token, or would get other ids.
    """
    import sentencepiece
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(path.read_bytes())
        _check_protobuf()
        backend = PreTrainedTokenizerFast.convert_to_native_format(vocab_file=str(path))["tokenizer_object"]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Name a SentencePiece .model file.") from None
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: not a readable SentencePiece model: {error}.") from None
    ids = {"unk_token": processor.unk_id(), "bos_token": processor.bos_id()}
    ids |= {"eos_token": processor.eos_id(), "pad_token": processor.pad_id()}
    special = {name: processor.id_to_piece(piece) for name, piece in ids.items() if piece >= 0}
    if "eos_token" not in special:
        raise ConfigError(f"{path}: has no end-of-sequence token, which marks the end of a document.")
    special.setdefault("pad_token", special["eos_token"])
    control = [piece for piece in range(len(processor)) if processor.is_control(piece) or processor.is_unknown(piece)]
    backend.add_special_tokens(
        [AddedToken(processor.id_to_piece(piece), normalized=False, special=True) for piece in control]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    _check_same_ids(tokenizer, processor, path)
    return tokenizer


def _check_protobuf() -> None:
    """Raise a ConfigError if the installed protobuf cannot read a model; transformers would ask for tiktoken."""
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception as error:  # missing, or protobuf's own version error
        raise ConfigError(
            f"reading SentencePiece .model files: {error} Run pip install --upgrade protobuf sentencepiece."
        ) from None


def _check_same_ids(tokenizer: Any, processor: Any, path: Path) -> None:
    """Raise a ConfigError if a Hugging Face tokenizer and a SentencePiece processor encode a text differently."""
    encoded = tokenizer(list(_PROBE), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    for text, ids in zip(_PROBE, encoded, strict=True):
        if ids != processor.encode(text):
            raise ConfigError(
                f"{path}: as a Hugging Face tokenizer it would encode {text!r} differently. Upgrade transformers, or "
                "convert it with the tools it came with and name the folder."
            )
