import functools
import hashlib
import json
import re
import tracemalloc
from collections import Counter, defaultdict

import pytest
from datasets import Dataset

from overparam.data import corpora, pairs, published, splits
from overparam.data.pairs import Triplet, cut, hub_triplets, triplets

VERSIONS = {"paraphrase": ("web", "kjv", "bbe"), "fr": ("web", "lsg"), "de": ("web", "elb")}


@functools.cache
def plain(text):
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


@pytest.fixture(scope="module")
def whole():
    """The ids of the verses by version and text, uncut."""
    found = {name: defaultdict(set) for name in ("web", "kjv", "bbe", "lsg", "elb")}
    for name, texts in found.items():
        for verse in corpora.verses(name):
            texts[verse.text].add(verse.id)
    return found


@pytest.fixture(scope="module")
def many():
    return triplets(8000, max_chars=120)


def test_sources_take_equal_turns(many):
    assert Counter(each.source for each in many) == dict.fromkeys(pairs.SOURCES, 2000)
    assert Counter(each.source for each in many[:400]) == dict.fromkeys(pairs.SOURCES, 100)
    assert Counter(each.source for each in triplets(6, sources=["de", "topic", "fr"])) == {
        "de": 2,
        "topic": 2,
        "fr": 2,
    }
    assert [each.source for each in triplets(5, sources=["de", "fr"])] == ["de", "fr", "de", "fr", "de"]


def test_the_seed_decides(many):
    assert triplets(40) == triplets(40)
    assert triplets(40) != triplets(40, seed=43)
    assert triplets(10, sources=["fr"]) == [each for each in triplets(40) if each.source == "fr"]
    text = json.dumps([[each.query, each.positive, each.negative] for each in triplets(40)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN


GOLDEN = "4f97cbe0c0fb6f9c"


def test_no_text_is_long_empty_or_repeated(many):
    for source in pairs.SOURCES:
        mine = [each for each in many if each.source == source]
        assert len({plain(each.query) for each in mine}) == len(mine)
        assert len({plain(each.positive) for each in mine}) == len(mine)
    for each in many:
        assert len({plain(each.positive), plain(each.negative)}) == 2
        assert plain(each.query) != plain(each.negative)
        assert all(1 <= len(text) <= 120 for text in (each.query, each.positive, each.negative))


@pytest.mark.parametrize("split", splits.SPLITS)
def test_no_text_of_another_split_is_in_a_triplet(split):
    others = [each for each in splits.SPLITS if each != split]
    held = {
        version: {
            plain(shown)
            for other in others
            for v in splits.verses_in(version, other)
            for shown in (v.text, cut(v.text, 120))
        }
        for version in ("web", "kjv", "bbe", "lsg", "elb")
    }
    everything = set().union(*held.values())
    if split == "train":
        for table in (
            corpora.newsgroups("test"),
            corpora.reuters("r52", "test"),
            corpora.reuters("r8", "test"),
        ):
            everything |= {plain(shown) for text in table[:]["text"] for shown in (text, cut(text, 120))}
    made = triplets(3200, split=split, max_chars=120)
    assert (
        not {plain(text) for each in made for text in (each.query, each.positive, each.negative)} & everything
    )


def test_a_verse_triplet_is_one_verse_and_a_neighbour_in_another_version(whole):
    for each in triplets(900, sources=["paraphrase", "fr", "de"], max_chars=10_000):
        ways = [(a, b) for a in VERSIONS[each.source] for b in VERSIONS[each.source] if a != b]
        if each.source != "paraphrase":
            ways = [VERSIONS[each.source]]
        assert any(
            other.rpartition(".")[0] == one.rpartition(".")[0] and other != one
            for asked, answered in ways
            for one in whole[asked].get(each.query, set()) & whole[answered].get(each.positive, set())
            for other in whole[answered].get(each.negative, set())
        ), each


def test_every_english_version_asks_and_answers(whole):
    made = triplets(600, sources=["paraphrase"], max_chars=10_000)
    for side in ("query", "positive"):
        counts = Counter(
            version
            for each in made
            for version in VERSIONS["paraphrase"]
            if getattr(each, side) in whole[version]
        )
        assert min(counts[version] for version in VERSIONS["paraphrase"]) > 150


def test_a_topic_triplet_has_one_topic_and_another():
    topics: dict[str, set[str]] = {}
    for name, table in (("20ng", corpora.newsgroups("train")), ("r52", corpora.reuters("r52", "train"))):
        names = table.features["label"].names
        for text, label in zip(table[:]["text"], table[:]["label"], strict=True):
            topics.setdefault(plain(cut(text, 256)), set()).add(f"{name} {names[label]}")
    made = triplets(1000, sources=["topic"])
    for each in made:
        (query,), (positive,), (negative,) = (
            topics[plain(text)] for text in (each.query, each.positive, each.negative)
        )
        assert query == positive != negative
        assert query.split()[0] == negative.split()[0]
    first = Counter(topics[plain(each.query)].copy().pop().split()[0] for each in made)
    assert first == {"20ng": 500, "r52": 500}


def test_impossible_wishes_are_refused():
    with pytest.raises(ValueError, match=r"'topic' gives \d+ triplets in the validation split.*at most \d+"):
        triplets(5000, sources=["topic"], split="validation")
    with pytest.raises(
        ValueError, match="unknown source of triplets 'paraphrases': did you mean 'paraphrase'"
    ):
        triplets(4, sources=["paraphrases"])
    with pytest.raises(ValueError, match="unknown split 'Train': did you mean 'train'"):
        triplets(4, split="Train")
    with pytest.raises(ValueError, match="got n=0"):
        triplets(0)
    with pytest.raises(ValueError, match="sources=\\(\\)"):
        triplets(4, sources=())
    with pytest.raises(ValueError, match="each named once"):
        triplets(4, sources=("fr", "fr"))


@pytest.mark.parametrize(
    ("text", "limit", "short"),
    [
        ("one two", 7, "one two"),
        ("one two", 6, "one"),
        ("one two three", 7, "one two"),
        ("unbreakable", 4, "unbr"),
        ("初めに神は", 3, "初めに"),
    ],
)
def test_texts_are_cut_between_words(text, limit, short):
    assert cut(text, limit) == short


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row(number, source):
    return {"query": f"q{number} {source} ñ", "positive": [f"p{number}", "unused"], "negative": f"n{number}"}


def test_published_triplets_are_read_from_a_folder(tmp_path):
    sizes = {"allnli": 30, "nq": 4, "quora": 50}
    for source, size in sizes.items():
        write(tmp_path / "echo", source, [row(number, source) for number in range(size)])
    everything = hub_triplets(tmp_path / "echo")
    assert Counter(each.source for each in everything) == sizes
    assert {each.query for each in everything} == {
        f"q{n} {s} ñ" for s, size in sizes.items() for n in range(size)
    }
    some = hub_triplets(tmp_path / "echo", 24)
    assert Counter(each.source for each in some) == {"allnli": 10, "nq": 4, "quora": 10}
    assert some == hub_triplets(tmp_path / "echo", 24)
    assert some != hub_triplets(tmp_path / "echo", 24, seed=1)
    one = hub_triplets(tmp_path / "echo" / "nq.jsonl", 1, max_chars=5)
    assert re.fullmatch(r"q\d nq", one[0].query)
    assert one[0].positive[0] == "p"
    assert {each.source for each in hub_triplets(tmp_path / "echo", sources=["nq"])} == {"nq"}


def test_published_triplets_that_are_wrong_are_named(tmp_path):
    write(tmp_path / "echo", "nq", [row(0, "nq"), {"query": "q", "positive": "p"}])
    with pytest.raises(ValueError, match=r"nq.jsonl, byte \d+: .* 'negative', got None"):
        hub_triplets(tmp_path / "echo")
    with pytest.raises(ValueError, match="holds 2 triplets in 1 sources, got n=3"):
        hub_triplets(tmp_path / "echo", 3)
    with pytest.raises(ValueError, match="'na': did you mean 'nq'"):
        hub_triplets(tmp_path / "echo", sources=["na"])
    with pytest.raises(ValueError, match="at least 1"):
        hub_triplets(tmp_path / "echo", 0)
    (tmp_path / "echo" / "nq.jsonl").write_text('{"query": ')
    with pytest.raises(ValueError, match=r"nq.jsonl, byte 0: not a line of JSON"):
        hub_triplets(tmp_path / "echo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.jsonl file"):
        hub_triplets(tmp_path / "empty")


def in_parts(folder, sizes):
    for source, size in sizes.items():
        write(folder, source, [row(number, source) for number in range(size)])
    return folder


def test_a_data_set_that_is_there_whole_and_in_parts_is_read_once(tmp_path):
    echo = in_parts(tmp_path / "echo", {"allnli": 6, "allnli_split1": 3, "allnli_split2": 3, "nq": 2})
    assert Counter(each.source for each in hub_triplets(echo)) == {"allnli": 6, "nq": 2}
    assert Counter(each.source for each in hub_triplets(echo, 4)) == {"allnli": 2, "nq": 2}
    assert {each.query for each in hub_triplets(echo, sources=["allnli_split2"])} == {
        f"q{n} allnli_split2 ñ" for n in range(3)
    }
    with pytest.raises(ValueError, match="'allnli' and its part 'allnli_split1'"):
        hub_triplets(echo, sources=["allnli", "allnli_split1"])


def test_parts_alone_make_one_source(tmp_path):
    sizes = {"quora_duplicates_split1": 3, "quora_duplicates_split2": 5, "nq": 8}
    echo = in_parts(tmp_path / "echo", sizes)
    everything = hub_triplets(echo)
    assert Counter(each.source for each in everything) == {"nq": 8, "quora_duplicates": 8}
    assert len({each.query for each in everything}) == 16
    assert Counter(each.source for each in hub_triplets(echo, 8)) == {"nq": 4, "quora_duplicates": 4}


def test_parts_of_a_hub_data_set_are_read_once_too(monkeypatch):
    names = ["own", "own_split1", "own_split2", "other"]
    rows = [{**row(number, "s"), "positive": "p", "source": names[number % 4]} for number in range(12)]
    monkeypatch.setattr(published, "hub", lambda *_, **__: Dataset.from_list(rows))
    assert Counter(each.source for each in hub_triplets("some/set")) == {"own": 3, "other": 3}


def test_a_proportional_draw_follows_the_sizes(tmp_path):
    echo = in_parts(tmp_path / "echo", {"large": 900, "small": 100})
    drawn = hub_triplets(echo, 500, draw="proportional")
    assert len({each.query for each in drawn}) == 500
    assert 30 <= Counter(each.source for each in drawn)["small"] <= 70  # 50 expected, 4.7 its deviation
    assert drawn == hub_triplets(echo, 500, draw="proportional")
    assert drawn != hub_triplets(echo, 500, draw="proportional", seed=1)
    assert len(hub_triplets(echo, draw="proportional")) == 1000


def test_a_proportional_draw_takes_whole_batches(tmp_path):
    echo = in_parts(tmp_path / "echo", {"large": 50, "small": 11, "tiny": 3})
    drawn = hub_triplets(echo, 40, draw="proportional", group=4)
    assert all(len({each.source for each in drawn[at : at + 4]}) == 1 for at in range(0, 40, 4))
    assert Counter(each.source for each in hub_triplets(echo, draw="proportional", group=4)) == {
        "large": 48,
        "small": 8,
    }
    with pytest.raises(ValueError, match="multiple of the group of 4 triplets, got 5"):
        hub_triplets(echo, 5, draw="proportional", group=4)
    with pytest.raises(ValueError, match="holds 56 triplets"):
        hub_triplets(echo, 60, draw="proportional", group=4)


def test_published_triplets_carry_the_instructions_of_their_data_set(tmp_path):
    sizes = {"nq": 2, "allnli": 4, "quora_duplicates_split2": 2, "mine": 1}
    made = hub_triplets(in_parts(tmp_path / "echo", sizes))
    asked = {each.query: (each.query_instruction, each.document_instruction) for each in made}
    question = "Given a question, retrieve Wikipedia passages that answer the question"
    assert asked["q0 nq ñ"] == (question, None)
    turns = [asked[f"q{number} allnli ñ"] for number in range(4)]
    assert turns[0] == turns[2] != turns[1] == turns[3]  # by turns along the lines of the file
    assert {given for _, given in turns} == {None}
    query, document = asked["q0 quora_duplicates_split2 ñ"]
    assert query == document == "Find questions that have the same meaning as the input question"
    assert asked["q0 mine ñ"] == (None, None)


def test_packaged_triplets_carry_instructions():
    for each in triplets(8):
        assert each.query_instruction
        assert (each.document_instruction is None) == (each.source in ("fr", "de"))


def test_a_large_file_is_not_held_in_memory(tmp_path):
    write(tmp_path / "echo", "big", [row(number, "x" * 2000) for number in range(5000)])
    tracemalloc.start()
    assert len(hub_triplets(tmp_path / "echo", 10)) == 10
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


def test_published_triplets_are_read_from_the_hub(monkeypatch):
    rows = [{**row(number, "s"), "positive": "p", "source": "ab"[number % 2]} for number in range(10)]
    asked = []

    def hub(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_list(rows)

    monkeypatch.setattr(published, "hub", hub)
    made = hub_triplets("some/set", 4, revision="abc")
    assert Counter(each.source for each in made) == {"a": 2, "b": 2}
    assert isinstance(made[0], Triplet)
    assert asked == [(("some/set", None), {"split": "train", "revision": "abc"})]
