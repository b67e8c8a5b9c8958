import re
from pathlib import Path

import pytest
import yaml

from overparam.record import ledger
from overparam.record.stats import Estimate
from overparam.runner.plan import PROFILES, load_profile


def test_a_claim_is_judged_with_what_the_ledger_says_of_it():
    claim = ledger.judged("l3prune-large", measured=Estimate(-0.4, -0.9, 0.1, 40), margin=1.2)
    assert claim.statement == "The `large` pick (−21 % of the parameters) costs 0.3 points"
    assert claim.source == "L3Prune, arXiv 2410.14578, abstract"
    assert (claim.published, claim.unit, claim.figure) == ("−0.3 points", "points", "fig:layers-trained")
    assert claim.verdict == "reproduced"
    assert "−0.3 points" in claim.rule


def test_words_of_a_statement_come_from_the_study():
    words = {"share": 0.1, "target": 90.0, "task": "ReutersR8"}
    claim = ledger.judged(
        "distillation-10-reutersr8", measured=Estimate(-4, -5, -3, 9), margin=10, words=words
    )
    assert (
        claim.statement == "A student with 10% of the parameters keeps 90 % or more of its teacher: ReutersR8"
    )
    assert claim.published == "at least 90 % kept"
    with pytest.raises(ValueError, match="needs the word 'share'"):
        ledger.judged("distillation-10-reutersr8", measured=None, margin=10, note="no data")


def test_an_exact_id_goes_before_a_form():
    assert ledger.find("distillation-soft-targets").id == "distillation-soft-targets"
    assert ledger.find("distillation-10-embedding").id == "distillation-{percent}-{task}"
    assert ledger.find("l3prune-larger") is None
    with pytest.raises(ValueError, match="'nothing' is not in the ledger"):
        ledger.judged("nothing", measured=None, margin=0)


def test_a_statement_without_its_words_shows_dots():
    assert ledger.find("moe-pretraining-fr").shown().startswith("The small translator reaches chrF++ … from")


def test_the_key_of_a_study_follows_its_own_claims_only(monkeypatch):
    before = {study: ledger.hashes(study) for study in ("trailing_layer_pruning", "moe_expert_pruning")}
    changed = [
        entry.model_copy(update={"published_value": -0.4}) if entry.id == "l3prune-large" else entry
        for entry in ledger.entries()
    ]
    file = ledger._file().model_copy(update={"claims": tuple(changed)})
    monkeypatch.setattr(ledger, "_file", lambda: file)
    assert ledger.hashes("trailing_layer_pruning") != before["trailing_layer_pruning"]
    assert ledger.hashes("moe_expert_pruning") == before["moe_expert_pruning"]


def test_every_paper_has_a_readable_source():
    for paper in ledger.papers().values():
        if paper.arxiv is None:
            assert paper.url.startswith("https://")
        else:
            assert paper.url == f"https://arxiv.org/abs/{paper.arxiv}"
            assert paper.cite.endswith(f"arXiv {paper.arxiv}")
    for entry in ledger.entries():
        assert "{" not in entry.cited()
        assert re.fullmatch(r"fig:[a-z0-9-]+", entry.figure)


def test_a_study_that_a_profile_runs_answers_its_claims_there():
    for path in PROFILES.glob("*.yaml"):
        jobs = load_profile(path.stem).jobs
        expected = {entry.study for entry in ledger.entries(path.stem)}
        if path.stem != "smoke":
            assert set(jobs) <= expected, path.stem


def a_claim(content):
    return next(claim for claim in content["claims"] if claim["id"] == "l3prune-negligible-30")


def test_checks_are_those_whose_source_is_this_suite():
    checks = {entry.id for entry in ledger.entries() if entry.type == "check"}
    assert {"moe-pretraining-load", "distillation-speed"} <= checks
    assert not [entry.id for entry in ledger.entries() if entry.id in checks and entry.front]


def test_studies_stand_in_the_order_of_their_notebooks():
    notebooks = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))
    order = [path.stem.partition("_")[2] for path in notebooks]
    assert ledger.studies() == [study for study in order if study in ledger.studies()]


def test_words_of_the_front_page_make_no_study_due(monkeypatch):
    before, whole = ledger.hashes("trailing_layer_pruning"), ledger.hashes()
    changed = [entry.model_copy(update={"front": None}) for entry in ledger.entries()]
    file = ledger._file().model_copy(update={"claims": tuple(changed)})
    monkeypatch.setattr(ledger, "_file", lambda: file)
    assert ledger.hashes("trailing_layer_pruning") == before
    assert ledger.hashes() != whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["claims"][0].update(colour="red"), "colour"),
        (lambda d: d["claims"][0].pop("source"), "source"),
        (lambda d: d["claims"][0].update(kind="sometimes"), "kind"),
        (lambda d: d["claims"].append(d["claims"][0]), "more than one claim moe-pretraining-load"),
        (lambda d: d["claims"][0].update(paper="nobody"), "lists no paper nobody"),
        (
            lambda d: d["claims"][0].pop("type"),
            "moe-pretraining-load is a goal of this suite, so it needs `type: check`",
        ),
        (
            lambda d: a_claim(d).update(type="check"),
            "l3prune-negligible-30 is a check, so its source must say",
        ),
        (lambda d: a_claim(d)["front"].update(claim="x" * 91), "at most 90 characters"),
        (
            lambda d: d["claims"][0].update(front=a_claim(d)["front"]),
            "moe-pretraining-load is a check: only claims",
        ),
        (
            lambda d: a_claim(d)["front"].update(of="another"),
            "stands for several claims: name one .* got 'another'",
        ),
        (
            lambda d: [each.update(front=a_claim(d)["front"]) for each in d["claims"]],
            "claims have `front`, the maximum is 24",
        ),
        (
            lambda d: [
                each.pop("front", None) for each in d["claims"] if each["study"] == "trailing_layer_pruning"
            ],
            "no claim of trailing_layer_pruning has `front`: each study needs at least one",
        ),
    ],
)
def test_a_broken_ledger_is_refused_with_the_reason(tmp_path, change, message):
    content = yaml.safe_load(ledger.LEDGER.read_text())
    change(content)
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        ledger.read(path)
