"""A SentencePiece model gives the same ids through transformers as by itself, trained here or given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from colm_ds.data.formats import read_records
from colm_ds.data.generated.text import write_text
from colm_ds.data.pretraining.sentencepiece_model import load_sentencepiece, train_sentencepiece
from colm_ds.errors import ConfigError, DataError

GIVEN = ("mistral_v1/tokenizer", "sp_small_2k/m", "sp_tiny_bytefallback/tokenizer", "t5/spiece")
TEXTS = (
    "",
    "  two  spaces ",
    "\tdef f(n):\n    return {n: 3.14}\r\n",
    "naïve 中文 🙂 x² ½",
    "a\u00a0b\u3000c",
    "▁under",
    "nul \0",
)


def texts_of(folder: Path) -> Iterator[str]:
    for file in sorted(folder.iterdir()):
        for _, record in read_records(file):
            yield record["text"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, 0.2)
    return list(texts_of(folder))


@pytest.fixture(scope="module")
def trained(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "some.model"
    path.write_bytes(train_sentencepiece(iter(texts), 500))
    return path


@pytest.fixture(scope="module")
def both(trained: Path) -> tuple[Any, Any]:
    """The trained model as a Hugging Face tokenizer, and by itself."""
    return load_sentencepiece(trained), sentencepiece.SentencePieceProcessor(model_file=str(trained))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Ids as preparation takes them."""
    found: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return found


def test_the_same_texts_train_the_same_model(texts: list[str], trained: Path) -> None:
    assert train_sentencepiece(iter(texts), 500) == trained.read_bytes()


def test_trained_as_llama_with_bytes_for_unknown_characters(both: tuple[Any, Any]) -> None:
    tokenizer, processor = both
    assert [processor.id_to_piece(piece) for piece in range(5)] == ["<unk>", "<s>", "</s>", "<pad>", "<0x00>"]
    assert tokenizer.special_tokens_map == {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    assert len(tokenizer) == len(processor) == 500
    assert [processor.id_to_piece(piece) for piece in ids_of(tokenizer, "中")] == ["▁", "<0xE4>", "<0xB8>", "<0xAD>"]
    assert tokenizer.decode(ids_of(tokenizer, "  中 2024\n")) == "  中 2024\n"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60).filter(lambda text: "<" not in text))
def test_any_text_gets_the_ids_of_sentencepiece(both: tuple[Any, Any], text: str) -> None:
    tokenizer, processor = both
    assert ids_of(tokenizer, text) == processor.encode(text)


def test_what_was_saved_gives_the_same_ids(both: tuple[Any, Any], texts: list[str], tmp_path: Path) -> None:
    tokenizer, processor = both
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*texts, *TEXTS, "</s> is text here"):
        assert ids_of(again, text) == ids_of(tokenizer, text) == processor.encode(text)


@pytest.mark.parametrize("name", GIVEN)
def test_models_of_others_give_the_ids_of_sentencepiece(name: str, shared_data: Path) -> None:
    """Byte-pair and unigram models, with and without byte fallback, normalisation and a pad token."""
    path = shared_data / "tokenizers" / f"{name}.model"
    tokenizer, processor = load_sentencepiece(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.eos_token_id == processor.eos_id()
    assert tokenizer.pad_token_id == (processor.pad_id() if processor.pad_id() >= 0 else processor.eos_id())
    for source in ("europarl", "github", "hackernews", "nih_exporter", "wikipedia_en"):
        for number, (_, record) in enumerate(read_records(shared_data / "pile5" / f"{source}.jsonl.gz")):
            if number == 40:
                break
            text = record["text"][:5000].replace("<", "(")
            assert ids_of(tokenizer, text) == processor.encode(text), (source, number)
    for text in TEXTS:
        assert ids_of(tokenizer, text) == processor.encode(text)


def test_what_is_no_model_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.model: cannot be read: No such file"):
        load_sentencepiece(tmp_path / "none.model")
    (tmp_path / "other.model").write_text("not a model")
    with pytest.raises(ConfigError, match=r"other\.model: not a readable SentencePiece model"):
        load_sentencepiece(tmp_path / "other.model")


def test_a_model_without_an_end_is_refused(texts: list[str], tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:200]), model_prefix=str(tmp_path / "m"), vocab_size=300, eos_id=-1, minloglevel=2
    )
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_sentencepiece(tmp_path / "m.model")


def test_a_converter_that_gives_other_ids_is_noticed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    convert = PreTrainedTokenizerFast.convert_to_native_format

    def without_prefix(**options: Any) -> dict[str, Any]:
        converted = convert(**options)
        converted["tokenizer_object"].pre_tokenizer = None
        return converted

    monkeypatch.setattr(PreTrainedTokenizerFast, "convert_to_native_format", without_prefix)
    with pytest.raises(ConfigError, match=r"some\.model: as a Hugging Face tokenizer it would encode 'Hello  world'"):
        load_sentencepiece(trained)


def test_protobuf_is_asked_for_where_it_is_missing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)  # importing it fails
    with pytest.raises(ConfigError, match="pip install --upgrade protobuf sentencepiece"):
        load_sentencepiece(trained)


def test_too_large_a_vocabulary_is_one_message(texts: list[str]) -> None:
    with pytest.raises(DataError, match="a vocabulary of 60000 cannot be trained"):
        train_sentencepiece(iter(texts[:5]), 60000)
