"""SentencePiece models: trained on texts, and turned into a Hugging Face tokenizer that gives the same tokens."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colm_ds.errors import ConfigError, DataError

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
_SPACE = "▁"
_NEVER = 100.0
_LONGEST_LINE_BYTES = 16384
_PROBE = ("Hello  world", " a\n\tb = 1234;\r\n", "naïve 中文 🙂 x²", "", "don't 3.14")


def train_sentencepiece(texts: Iterator[str], vocabulary_size: int) -> bytes:
    """Train a byte-pair model as Llama's: byte fallback, single digits, text taken as it is, `<unk> <s> </s> <pad>`.

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
        raise DataError(
            f"a vocabulary of {vocabulary_size} can not be trained on this text: {error}. Choose a smaller one."
        ) from None
    return model.getvalue()


def _lines(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            if line and "\0" not in line and len(line.encode()) <= _LONGEST_LINE_BYTES:
                yield line


def to_hugging_face(model: bytes, where: str) -> Any:
    """A fast Hugging Face tokenizer with the tokens of a SentencePiece model; it adds no special tokens by itself.

    Args:
        model: content of the `.model` file.
        where: what to call it in messages.

    Raises:
        ConfigError: if it is no SentencePiece model, has no end-of-sequence token, or would not give the same tokens.
    """
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        backend = _backend(processor, model)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"{where}: not a SentencePiece model that can be read: {error}.") from None
    names = {"unk_token": processor.unk_id(), "bos_token": processor.bos_id(), "eos_token": processor.eos_id()}
    names["pad_token"] = processor.pad_id()
    special = {name: processor.id_to_piece(piece) for name, piece in names.items() if piece >= 0}
    if "eos_token" not in special:
        raise ConfigError(f"{where}: has no end-of-sequence token, which marks the end of a document.")
    special.setdefault("pad_token", special["eos_token"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    check_same_tokens(tokenizer, processor, _PROBE, where)
    return tokenizer


def check_same_tokens(tokenizer: Any, processor: Any, texts: Sequence[str], where: str) -> None:
    """Raise a ConfigError if a Hugging Face tokenizer and a SentencePiece processor encode a text differently."""
    found = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    for text, ids in zip(texts, found, strict=True):
        if ids != processor.encode(text):
            raise ConfigError(
                f"{where}: as a Hugging Face tokenizer it would encode {text[:60]!r} otherwise. "
                "Convert it with the tools it came with and name the folder."
            )


def _backend(processor: Any, model: bytes) -> Any:
    """The `tokenizers` pipeline: normaliser, pieces, decoder."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    fields = _fields(model)
    trainer, normaliser = _fields(fields[2][-1]), _fields(fields[3][-1])
    pieces = [processor.id_to_piece(piece) for piece in range(len(processor))]
    steps: list[Any] = [normalizers.Precompiled(charsmap) for charsmap in normaliser.get(2, []) if charsmap]
    if normaliser.get(4, [1])[-1]:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normaliser.get(3, [1])[-1]:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    unk = processor.id_to_piece(processor.unk_id())
    if trainer.get(3, [1])[-1] == 2:
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        merges = _merges(processor, vocabulary)
        byte_fallback = bool(trainer.get(35, [0])[-1])
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback))
    else:
        scores = [(piece, processor.get_score(number)) for number, piece in enumerate(pieces)]
        lowest = min(score for _, score in scores) - _NEVER
        scores = [(piece, lowest if _is_no_text(processor, n) else score) for n, (piece, score) in enumerate(scores)]
        byte_fallback = bool(trainer.get(35, [0])[-1])
        backend = Tokenizer(models.Unigram(scores, processor.unk_id(), byte_fallback))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece for number, piece in enumerate(pieces) if processor.is_control(number) or piece == unk]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    return backend


def _merges(processor: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, best first, as SentencePiece joins them."""
    found = []
    for piece, number in vocabulary.items():
        if _is_no_text(processor, number):
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(processor.get_score(number), pair) for pair in pairs]
    found.sort(key=lambda item: -item[0])
    return [pair for _, pair in found]


def _is_no_text(processor: Any, number: int) -> bool:
    """Whether a piece stands for something else than its text."""
    return bool(processor.is_control(number) or processor.is_byte(number) or processor.is_unknown(number))


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Fields of a protocol buffer message by number: whole numbers, and bytes of what is nested."""
    fields: dict[int, list[Any]] = {}
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while place < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            fields.setdefault(number, []).append(varint())
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"unknown wire type {kind}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if number != 1 or kind != 2:  # the pieces themselves come from the library
            fields.setdefault(number, []).append(message[place : place + size])
        place += size
    return fields


def read_model(path: Path) -> bytes:
    """Content of a `.model` file.

    Raises:
        ConfigError: if it is missing.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: can not be read: {error.strerror}. Name a SentencePiece .model file.") from None
