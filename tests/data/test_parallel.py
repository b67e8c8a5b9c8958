import json

import polib
import pytest

from overparam.assets import packages
from overparam.data import corpora, parallel, splits
from overparam.data.parallel import Pair


def test_verse_pairs_are_the_verses_of_both_versions_in_one_split():
    french = {verse.id: verse.text for verse in corpora.verses("lsg")}
    web = {verse.id: verse.text for verse in corpora.verses("web")}
    pairs = parallel.verse_pairs("en", "fr", "validation")
    assert all(pair.source == web[pair.id] and pair.target == french[pair.id] for pair in pairs)
    of = splits.verse_splits()
    assert {of[pair.id] for pair in pairs} == {"validation"}
    order = [verse.id for verse in corpora.verses("web")]
    assert [pair.id for pair in pairs] == [id_ for id_ in order if id_ in {pair.id for pair in pairs}]
    total = sum(len(parallel.verse_pairs("en", "fr", split)) for split in splits.SPLITS)
    assert (
        total == 31102 - 38
    )  # what the Bible in Basic English lacks, the verse that the Elberfelder lacks included


def test_every_language_pair_gets_the_same_verses():
    languages = list(parallel.VERSIONS)
    draws = [
        [pair.id for pair in parallel.verse_pairs(source, target, "test", n=50, seed=3)]
        for source in languages
        for target in languages
        if source != target
    ]
    draws.append([pair.id for pair in parallel.verse_pairs("en", "fr", "test", n=50, seed=3, english="bbe")])
    assert all(draw == draws[0] for draw in draws)
    assert len(set(draws[0])) == 50


def test_draws_are_seeded_nested_and_without_replacement():
    def draw(n, seed):
        return parallel.verse_pairs("en", "de", "test", n=n, seed=seed)

    assert draw(10, 0) == draw(30, 0)[:10] != draw(10, 1)
    whole = parallel.verse_pairs("en", "de", "test")
    assert sorted(draw(len(whole), 0), key=lambda pair: pair.id) == sorted(whole, key=lambda pair: pair.id)


def test_interface_strings_are_plain_and_the_same_in_every_language():
    by_language = {language: parallel.interface_pairs(language) for language in ("fr", "de", "es", "it")}
    assert len({tuple((p.id, p.source) for p in pairs) for pairs in by_language.values()}) == 1
    pairs = by_language["fr"]
    assert len(pairs) > 2000
    assert len({corpora.normalise(pair.source) for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert 3 <= len(pair.source.split()) <= 30
        assert pair.target.strip()
        assert not set("%{}<>\n") & set(pair.source + pair.target)
        assert corpora.normalise(pair.source) != corpora.normalise(pair.target)
    assert {pair.id.partition(":")[0] for pair in pairs} == {"django", "wagtail", "weblate"}
    texts = {pair.source: pair.target for pair in pairs}
    assert texts["A group with that name already exists."] == "Un groupe avec ce nom existe déjà."
    some = [[p.id for p in parallel.interface_pairs(each, n=20, seed=1)] for each in ("fr", "it")]
    assert some[0] == some[1]


def test_messages_that_are_not_plain_translations_are_dropped(tmp_path):
    catalogue = polib.POFile()
    kept = ("Save the _file now", "Enregistrez le _fichier maintenant")
    entries = [
        {"msgid": kept[0], "msgstr": kept[1]},
        {"msgid": "A fuzzy message here", "msgstr": "un message", "flags": ["fuzzy"]},
        {"msgid": "An obsolete message here", "msgstr": "un message", "obsolete": True},
        {"msgid": "Not yet translated here", "msgstr": ""},
        {"msgid": "one thing is there", "msgid_plural": "many", "msgstr_plural": {0: "a", 1: "b"}},
        {"msgid": "Hello %(name)s, dear friend", "msgstr": "Bonjour"},
        {"msgid": "Hello %s my dear friend", "msgstr": "Bonjour"},
        {"msgid": "Hello {name} my dear friend", "msgstr": "Bonjour"},
        {"msgid": "Hello <b>my</b> dear friend", "msgstr": "Bonjour"},
        {"msgid": "Hello my dear friend", "msgstr": "Bonjour&nbsp;!"},
        {"msgid": "Too short", "msgstr": "Trop court"},
        {"msgid": "1 2 - word", "msgstr": "1 2 - mot"},
        {"msgid": "word " * 31, "msgstr": "mot"},
    ]
    catalogue.extend(polib.POEntry(**entry) for entry in entries)
    catalogue.save(str(tmp_path / "django.po"))
    assert list(parallel._messages(tmp_path / "django.po")) == [tuple(t.replace("_", "") for t in kept)]


def test_licences_are_kept_beside_the_catalogues():
    folder = packages.fetch("interface")
    owners = {path.relative_to(folder).parts[0] for path in folder.rglob("*.dist-info/licenses/LICENSE")}
    assert owners == {"django", "wagtail", "weblate"}
    assert set(corpora.provenance("interface")) == {"django==5.2.19", "wagtail==8.0.1", "weblate==5.14.3"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set of the hub's kind, in a folder: configurations and splits named in its card."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(configurations):
        card = ["---", "configs:"]
        for (name, split), rows in configurations.items():
            file = tmp_path / "set" / f"{name}-{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            card += [
                f"- config_name: {name}",
                "  data_files:",
                f"  - split: {split}",
                f"    path: {file.name}",
            ]
        (tmp_path / "set" / "README.md").write_text("\n".join([*card, "---", ""]))
        return tmp_path / "set"

    return write


def test_flores_pairs_meet_by_id(folder):
    path = folder(
        {
            ("eng_Latn", "dev"): [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}, {"id": 3, "text": "x"}],
            ("fra_Latn", "dev"): [{"id": 2, "text": "deux"}, {"id": 1, "text": "un"}],
        }
    )
    assert parallel.flores("en", "fr", "dev", path=path) == [
        Pair("dev.1", "one", "un"),
        Pair("dev.2", "two", "deux"),
    ]
    assert parallel.flores("fra_Latn", "en", "dev", path=path, n=1, seed=1)[0].target in ("one", "two")


def test_wmt24pp_leaves_bad_sources_out(folder):
    row = {"document_id": "d", "segment_id": 7, "is_bad_source": False, "source": "one", "target": "eins"}
    path = folder({("en-de_DE", "train"): [row, {**row, "segment_id": 8, "is_bad_source": True}]})
    assert parallel.wmt24pp("de", path=path) == [Pair("d:7", "one", "eins")]


def test_hub_sets_without_network_say_what_to_do(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(RuntimeError, match=r"flores_plus \(eng_Latn\).*[Ww]ithout a network"):
        parallel.flores("en", "fr")
    with pytest.raises(RuntimeError, match=r"wmt24pp \(en-ar_EG\).*[Ww]ithout a network"):
        parallel.wmt24pp("arz")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parallel.verse_pairs("en", "frr", "test"), "unknown language 'frr': did you mean 'fr'"),
        (lambda: parallel.verse_pairs("en", "fr", "tets"), "unknown split 'tets': did you mean 'test'"),
        (
            lambda: parallel.verse_pairs("en", "fr", "test", english="lsg"),
            "unknown English version 'lsg'",
        ),
        (lambda: parallel.verse_pairs("fr", "fr", "test"), "needs two languages, got 'fr' twice"),
        (lambda: parallel.verse_pairs("en", "fr", "test", n=0), "n must be in 1.."),
        (lambda: parallel.verse_pairs("en", "fr", "test", n=10**6), "got 1000000"),
        (lambda: parallel.interface_pairs("en"), "unknown language of interface strings 'en'"),
        (lambda: parallel.flores("en", "fr", "test"), "unknown split of FLORES\\+ 'test'"),
        (lambda: parallel.flores("en", "xx"), "unknown language 'xx'"),
        (lambda: parallel.wmt24pp("dee"), "unknown language 'dee': did you mean 'de'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
