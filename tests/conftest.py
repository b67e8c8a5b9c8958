import functools
import json
import os
import time

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch is loaded, here and in all that tests start
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores


# the longest first: the workers that are free take the others meanwhile (files are given out in this order)
LONGEST = (
    "test_smoke",
    "test_redraw",
    "test_execute",
    "test_quantize",
    "test_moe_expert_pruning",
    "test_cluster",
)


def pytest_collection_modifyitems(items):
    """Begin with the test files that take longest."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_runtest_setup():
    """Begin no test after the time that `make check` has (tests/changed.py)."""
    end = os.environ.get("OVERPARAM_TESTS_END")
    if end and time.time() > float(end):
        pytest.skip("no time left in make check: make test runs it")


@pytest.fixture
def sentence_folder(tmp_path):
    """Builds tiny sentence-transformers folders, in the layout of today or of version 2."""
    return functools.partial(_sentence_folder, tmp_path)


def _sentence_folder(path, name="bert", pooling="mean", *, dense=(), normalize=True, old=False, **settings):
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    from overparam import models

    plain = path / "plain"
    models.tiny_twin(name).save_pretrained(plain)
    models.tiny_tokenizer().save_pretrained(plain)
    lower = settings.pop("do_lower_case", False)
    transformer = Transformer(
        str(plain), max_seq_length=settings.pop("max_seq_length", 24), do_lower_case=lower
    )
    include = settings.pop("include_prompt", True)
    modules = [transformer, Pooling(32, pooling, include_prompt=include)]
    torch.manual_seed(5)
    width = modules[1].get_embedding_dimension()
    for outputs, activation in dense:
        modules.append(Dense(width, outputs, activation_function=activation))
        width = outputs
    modules += [Normalize()] if normalize else []
    whole = SentenceTransformer(modules=modules, device="cpu", **settings)
    target = path / "model"
    whole.save(str(target), create_model_card=False)
    if old:
        _as_version_2(target)
    return str(target)


def _as_version_2(target):
    types = json.loads((target / "modules.json").read_text())
    for module in types:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    (target / "modules.json").write_text(json.dumps(types))
    config = json.loads((target / "1_Pooling/config.json").read_text())
    modes = config.pop("pooling_mode")
    modes = [modes] if isinstance(modes, str) else modes
    names = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "lasttoken": "lasttoken"}
    config |= {f"pooling_mode_{name}": mode in modes for mode, name in names.items()}
    config["word_embedding_dimension"] = config.pop("embedding_dimension")
    (target / "1_Pooling/config.json").write_text(json.dumps(config))
    (target / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 24, "do_lower_case": False})
    )
