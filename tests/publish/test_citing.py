import hashlib
import json
import re
from pathlib import Path

import pytest
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import Draft7Validator
from rocrate.rocrate import ROCrate
from ruamel.yaml import YAML

from overparam.cli import commands
from overparam.publish import citing, crate, inventory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path, make_record):
    make_record(tmp_path / "layers" / "tiny-1", slug="tiny", figure=True)
    make_record(tmp_path / "layers" / "small-1", slug="small", figure=True)
    return tmp_path


def test_every_figure_has_a_row_with_files_and_where_they_come_from(results):
    found = inventory.take(results)
    citing.write(found)
    rows = json.loads((results / "figures.json").read_text())
    assert [row["name"] for row in rows] == ["fig:layers-loss@small", "fig:layers-loss@tiny"]
    row = rows[1]
    assert row["claims"] == ["large"]
    assert row["csv"] == "layers/tiny-1/loss.csv"
    assert (row["license"], row["caption"]) == ("Apache-2.0", "Loss.")
    for name, sha256 in row["files"].items():
        assert hashlib.sha256((results / name).read_bytes()).hexdigest() == sha256
    assert (results / row["record"]).is_file()
    assert row["command"].startswith("python run_all.py")


def test_an_ambiguous_figure_is_asked_for_by_slug(results, capsys):
    found = inventory.take(results)
    with pytest.raises(
        ValueError, match="2 records have the figure fig:layers-loss: name one, fig:layers-loss@small or"
    ):
        citing.find(found, "fig:layers-loss")
    with pytest.raises(ValueError, match="did you mean 'fig:layers-loss"):
        citing.find(found, "fig:layer-loss")
    assert commands.main(["cite", "layers-loss@tiny", "--results", str(results)], ROOT) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("@misc{overparam:layers-loss:tiny,")
    key = citing.find(found, "fig:layers-loss@tiny").record.key
    assert key in printed
    assert "Loss. Measured by overparam, study layers" in printed


def test_bibtex_is_balanced_and_escaped(results):
    entry = citing.bibtex(citing.find(inventory.take(results), "fig:layers-loss@tiny"), ROOT / "CITATION.cff")
    assert entry.count("{") == entry.count("}")
    assert not re.search(r"(?<!\\)[%&#$_]", entry.split("\n", 1)[1])
    assert re.search(r"year +=", entry)


def test_the_software_citation_follows_the_schema_of_its_format():
    citation = YAML(typ="safe", pure=True).load((ROOT / "CITATION.cff").read_text())
    citation = json.loads(json.dumps(citation, default=str))
    schema = get_builtin_schema("vendor.citation-file-format")
    problems = [error.message for error in Draft7Validator(schema).iter_errors(citation)]
    assert problems == []


def test_the_crate_describes_every_file_of_every_run(results):
    found = inventory.take(results)
    for writer in (citing, crate):
        writer.write(found)
    (results / "REPORT.md").write_text("")
    assert not crate.write(inventory.take(results))
    read = ROCrate(results)
    actions = [entity for entity in read.get_entities() if entity.type == "CreateAction"]
    assert len(actions) == 2
    for action in actions:
        assert action["instrument"].type == "SoftwareApplication"
        named = {entity.id for entity in action["result"]}
        assert any(name.endswith("/record.json") for name in named)
        assert all((results / name).is_file() for name in named)
    parts = {entity.id for entity in read.root_dataset["hasPart"]}
    assert {"REPORT.md", "figures.json", "layers/tiny-1/loss.pdf"} <= parts
    assert read.root_dataset["conformsTo"].id == crate.PROFILE
