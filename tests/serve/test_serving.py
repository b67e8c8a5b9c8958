import numpy as np
import pytest

from overparam import models, serve
from overparam.compress import quantize
from overparam.serve import encoding, llama_cpp, tuning
from overparam.serve.encoding import Encoders, Setting

TEXTS = [
    "short",
    "a text that is a good deal longer than the first",
    "two words",
    "and a last one of some length",
]


@pytest.fixture(scope="module")
def encoders():
    return Encoders(*models.load("tiny-bert"), max_length=32)


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_no_setting_changes_an_embedding(encoders, batch, by_length):
    expected = quantize.embed(quantize.states_of(encoders.model), encoders.tokenizer, TEXTS, max_length=32)
    found = encoders.embed(TEXTS, Setting("fp32", batch, 1, by_length))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_padding_is_counted_as_it_is_computed(encoders):
    lengths = [len(encoders.tokenizer(text)["input_ids"][:16]) for text in TEXTS]
    ordered = sorted(lengths)
    unsorted = 2 * max(lengths[:2]) + 2 * max(lengths[2:])
    by_length = 2 * ordered[1] + 2 * ordered[3]
    found = [encoders.padding(TEXTS, Setting("fp32", 2, 1, each), length=16) for each in (False, True)]
    assert found == pytest.approx([1 - sum(lengths) / unsorted, 1 - sum(lengths) / by_length])
    assert encoders.padding(TEXTS, Setting("fp32", 1, 1)) == 0


def test_the_grid_has_the_default_first_and_no_order_of_single_texts():
    default = Setting("fp32", 8, 2)
    grid = encoding.settings(("fp32", "openvino-fp32"), (1, 8), (1, 2), default=default)
    assert grid[0] == default
    assert len(grid) == len(set(grid)) == 2 * 2 * (1 + 2)
    near = encoding.one_knob(grid, default)
    assert {str(each) for each in near[1:]} == {
        "openvino-fp32, 8 texts, 2 threads, sorted",
        "fp32, 1 text, 2 threads, sorted",
        "fp32, 8 texts, 1 thread, sorted",
        "fp32, 8 texts, 2 threads, as they come",
    }


def test_emulated_bfloat16_is_tried_once(monkeypatch):
    default = Setting("fp32", 8, 2)
    monkeypatch.setattr(models, "bf16_is_fast", lambda: False)
    grid = encoding.settings(("fp32", "bf16"), (1, 8), (1, 2), default=default)
    assert [each for each in grid if each.scheme == "bf16"] == [Setting("bf16", 8, 2)]


def test_schemes_that_cannot_run_have_a_reason(encoders, monkeypatch):
    assert encoders.reason_against("fp32") is None
    assert "calibrate" in encoders.reason_against("openvino-int8")
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "compiler" in encoders.reason_against("fp32-compiled")


def test_llama_cpp_that_is_not_installed_has_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda _: None)
    assert (
        llama_cpp.reason_against(tmp_path) == "the package xllamacpp is not installed: pip install xllamacpp"
    )
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda _: "there")
    assert llama_cpp.reason_against(None) == "the model is not a GGUF file"
    assert llama_cpp.reason_against(tmp_path) == ""


def test_a_gguf_file_that_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    pytest.importorskip("xllamacpp")
    with pytest.raises(OSError, match=r"llama\.cpp cannot load none\.gguf"):
        llama_cpp.LlamaCpp(tmp_path / "none.gguf", threads=1)


def test_tuning_gives_a_setting_with_its_gain_and_its_embeddings():
    found = serve.autotune(
        "tiny-bert", [f"{text} {n}" for n in range(4) for text in TEXTS], budget_s=20, schemes=("fp32",),
        batches=(1, 32), threads=(1,),
    )  # fmt: skip
    assert found.setting.scheme == "fp32"
    assert found.low <= found.gain <= found.high
    assert found.cosine == 1
    assert {"fp32, 1 text, 1 thread, sorted", "fp32, 32 texts, 1 thread, sorted"} <= set(found.table["cell"])
    assert "times as fast as the default" in str(found)
    plain = found.encoders.embed(TEXTS, Setting("fp32", 32, 1))
    np.testing.assert_allclose(found.encode(TEXTS), plain, atol=1e-5)


def test_precisions_that_change_embeddings_are_left_out(monkeypatch):
    real = Encoders.embed

    def embed(self, texts, setting, *, length=None):
        vectors = real(self, texts, Setting("fp32", setting.batch, 1), length=length)
        return vectors[:, ::-1].copy() if setting.scheme == "bf16" else vectors

    monkeypatch.setattr(Encoders, "embed", embed)
    found = serve.autotune(
        "tiny-bert", TEXTS * 3, budget_s=10, schemes=("fp32", "bf16"), batches=(1, 32), threads=(1,)
    )
    assert found.setting.scheme == "fp32"
    assert "cosine" in found.table.set_index("cell").loc["bf16", "status"]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (TEXTS, {}, "texts must be at least 8"),
        (TEXTS * 2, {"budget_s": 1e-9, "batches": (1,)}, "budget_s = 1e-09 ended"),
    ],
)
def test_bad_tuning_is_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        serve.autotune("tiny-bert", texts, schemes=("fp32",), threads=(1,), **options)


def test_cosine_is_that_of_rows():
    a, b = np.eye(2, 3, dtype=np.float32), np.array([[2, 0, 0], [0, 1, 1]], dtype=np.float32)
    assert tuning.cosine(a, b) == pytest.approx((1 + 0.5**0.5) / 2)
