"""Every text architecture of transformers that can be built tiny: each operation is exact there, or refused.

`python -m tests.benchmarks.architectures` sweeps them (a few minutes on two cores) and writes lib/ARCHITECTURES.md; it
ends with 1 where an operation gave something else than its plain counterpart. Architectures are tried in processes of
their own, so that a library that crashes takes only one of them along. With names, only those are tried, and printed.

The plain counterparts are written here anew: every depth against a truncated model that reads each text alone, a
reload against `AutoModel`, pruned experts against the whole model whose router may not choose the others, a scheme's
share of quantized weights against a count of the weights that changed, and an export against torch.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "lib" / "ARCHITECTURES.md"
LAYERS = 4
TEXTS = (
    "In the beginning God created the heavens and the earth.",
    "x y z",
    "Au commencement, Dieu créa les cieux et la terre.",
)
Outcome = tuple[str, str]  # "exact", "refused", "none" or "wrong", and why


def main() -> int:
    """Sweep, write the page, and return 0 when nothing is wrong."""
    from transformers import CONFIG_MAPPING

    from overparam.models.tiny import tiny_config

    names, not_tiny = [], {}
    for name in sorted(CONFIG_MAPPING):
        try:
            tiny_config(name)
        except ValueError as error:
            not_tiny[name] = str(error)
        else:
            names.append(name)
    chosen = sys.argv[1:] or names
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        shards = [chosen[start :: pool._max_workers] for start in range(pool._max_workers)]
        found = dict(sorted(chain.from_iterable(pool.map(_shard, shards))))
    wrong = [
        f"{name}: {what}: {why}"
        for name, outcomes in found.items()
        for what, (kind, why) in outcomes.items()
        if kind == "wrong"
    ]
    if sys.argv[1:]:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        PAGE.write_text(page(found, not_tiny), encoding="utf-8")
    counts = {
        what: Counter(found[name][what][0] for name in found if what in found[name]) for what in OPERATIONS
    }
    for what, count in counts.items():
        print(f"{what:<40} {'  '.join(f'{kind} {n}' for kind, n in sorted(count.items()))}")
    print("\n".join(wrong) or "nothing is wrong")
    return int(bool(wrong))


def _shard(names: list[str]) -> list[tuple[str, dict[str, Outcome]]]:
    """Try architectures one after the other in a process that is replaced when it dies."""
    found: list[tuple[str, dict[str, Outcome]]] = []
    waiting = list(names)
    while waiting:
        command = [sys.executable, "-m", "tests.benchmarks.architectures", "--worker", *waiting]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    found.append((waiting.pop(0), json.loads(line)))
                    print(f"{found[-1][0]:<28} {_short(found[-1][1])}", file=sys.stderr, flush=True)
        if process.returncode and waiting:
            found.append((waiting.pop(0), {"process": ("wrong", f"ended with {process.returncode}")}))
    return found


def _short(outcomes: dict[str, Outcome]) -> str:
    return "  ".join(f"{what}: {kind}" for what, (kind, _) in outcomes.items())


def worker(names: list[str]) -> None:
    """Print one line of JSON for each architecture."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    for name in names:
        outcomes = {what: _tried(operation, name) for what, operation in OPERATIONS.items()}
        print(json.dumps({what: outcome for what, outcome in outcomes.items() if outcome}), flush=True)


def _tried(operation: Callable[[str], Iterator[str]], name: str) -> Outcome | None:
    """What an operation did: an error that is ours is a refusal, any other one is wrong, and so is what it yields."""
    try:
        differences = list(operation(name))
    except NotApplicableError:
        return None
    except ValueError as error:
        return "refused", str(error).splitlines()[0]
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ("wrong", "; ".join(differences)) if differences else ("exact", "")


class NotApplicableError(Exception):
    """There is nothing to do: no experts, no language-modelling head."""


def every_depth(name: str) -> Iterator[str]:
    """All depths in one padded pass, against truncated models that read each text alone."""
    import numpy as np
    import torch

    from overparam import models
    from overparam.compress import depth

    model, tokenizer = _built(name), models.tiny_tokenizer()
    found = depth.layer_embeddings(model, tokenizer, TEXTS, pooling="mean")
    for keep in range(1, found.shape[1]):
        try:
            small = model if keep == found.shape[1] - 1 else depth.truncate(copy.deepcopy(model), keep)
        except ValueError:
            continue  # refused as a cut, which has a column of its own
        for row, text in enumerate(TEXTS):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                alone = small(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0].mean(0).numpy()
            error = np.abs(found[row, keep] - alone).max() / np.sqrt((alone**2).mean())
            if not error < 1e-3:
                yield f"depth {keep} is off by {error:.1e}"
                return


def cut(keep: int | list[int]) -> Callable[[str], Iterator[str]]:
    """Truncate, save, reload with `AutoModel`: the same states; a refusal must leave all as it was."""

    def tried(name: str) -> Iterator[str]:
        import torch
        from transformers import AutoModel

        from overparam import models
        from overparam.compress import depth

        model, tokenizer = _built(name), models.tiny_tokenizer()
        before, config = dict(model.named_parameters()), model.config.to_json_string(use_diff=False)
        ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "cut"
            try:
                depth.truncate(model, keep)
                depth.save(model, tokenizer, folder)
            except ValueError as error:
                if folder.exists() or list(Path(place).iterdir()):
                    yield f"refused ({error}) but left {list(Path(place).rglob('*'))}"
                    return
                after = dict(model.named_parameters())
                same = after.keys() == before.keys() and model.config.to_json_string(use_diff=False) == config
                if not same and "reload" not in str(error):
                    yield f"refused ({error}) but the model is changed"
                    return
                raise
            again, report = AutoModel.from_pretrained(folder, output_loading_info=True)
            if report["missing_keys"] or report["mismatched_keys"]:
                yield f"the reload has random weights: {sorted(report['missing_keys'])[:2]}"
            others = dict(again.named_parameters())
            if lost := [key for key, ours in model.named_parameters() if not ours.equal(others[key])]:
                yield f"{len(lost)} weights come back as others: {lost[:2]}"
            with torch.no_grad():
                pair = [each.eval()(input_ids=ids)[0] for each in (model, again)]
            error = models.proof.difference(*pair)
            if not error < 1e-5:  # a matrix that lies elsewhere in memory may be multiplied in another order
                yield f"the reload is off by {error:.1e}"

    return tried


def pruned_experts(name: str) -> Iterator[str]:
    """Half of the experts sliced away, against the whole model whose router cannot choose them; then reloaded."""
    import torch

    from overparam import models
    from overparam.compress import experts
    from tests.compress.test_experts_pruning import masked

    whole = _causal(name, n_group=1, topk_group=1)
    if not any("expert" in parameter for parameter, _ in whole.named_parameters()):
        raise NotApplicableError
    model = copy.deepcopy(whole)
    keep = [list(range(0, layer.n_experts, 2)) for layer in experts.layers(model)]
    ids = torch.arange(8, 40).reshape(2, 16)
    with torch.no_grad():
        experts.prune(model, keep, lower_top_k=True)
        found = model(input_ids=ids).logits
        with masked(whole, keep):
            expected = whole(input_ids=ids).logits
        error = models.proof.difference(found, expected)
        if not error < 1e-3:
            yield f"the sliced model is off by {error:.1e}"
        with tempfile.TemporaryDirectory() as place:
            experts.save_pruned(model, Path(place) / "pruned")
            again = experts.load_pruned(Path(place) / "pruned").eval()
            if not torch.equal(again(input_ids=ids).logits, found):
                yield "the reload differs"


def rounded(name: str) -> Iterator[str]:
    """Rounding to 2 bits, against a count of the weights that it changed."""
    from overparam.compress import quantize

    model = _causal(name) if _decodes(name) else _built(name)
    before = {
        key: parameter.detach().clone() for key, parameter in model.named_parameters() if parameter.ndim >= 2
    }
    quantize.round_weights(model, 2)
    now = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in before.values())
    changed = sum(p.numel() for key, p in before.items() if not p.equal(now[key]))
    if changed < 0.85 * total:
        left = sorted(
            (key for key, p in before.items() if p.equal(now[key])), key=lambda key: -before[key].numel()
        )
        yield f"only {100 * changed / total:.0f} % of the weights changed, not {', '.join(left[:3])}"


def in_eight_bits(name: str) -> Iterator[str]:
    """torchao's 8 bits: no weight moves by more than half a step, and as many are packed as the coverage says."""
    import torch

    from overparam import models
    from overparam.compress import quantize

    decoder = _decodes(name)
    model = _causal(name) if decoder else _built(name)
    if model.config.is_encoder_decoder:  # no study quantizes one
        raise NotApplicableError
    if reason := quantize.reason_against("torchao-int8", model, decoder=decoder):
        raise ValueError(reason)
    found = quantize.quantize(model, "torchao-int8", decoder=decoder)
    ids = torch.arange(8, 24).reshape(1, 16)
    with torch.no_grad():
        error = models.proof.difference(found.model(input_ids=ids)[0], model(input_ids=ids)[0])
    if not 0 < error < float("inf"):
        yield f"outputs are off by {error:.1e}"
    before = dict(model.named_parameters())
    for key, parameter in found.model.named_parameters():
        if type(parameter) is not torch.nn.Parameter and parameter.ndim == 2:
            steps = before[key].detach().abs().amax(dim=1, keepdim=True) / 127
            worst = float(
                ((parameter.dequantize() - before[key].detach()).abs() / steps.clamp(min=1e-12)).max()
            )
            if worst > 0.55:  # half a step, by the largest weight of the row
                yield f"{key} is off by {worst:.2f} steps"
                break
    weights = [p for p in model.parameters() if p.ndim >= 2]
    total = sum(p.numel() for p in weights)
    packed = sum(
        p.numel() for p in found.model.parameters() if type(p) is not torch.nn.Parameter and p.ndim >= 2
    )
    assert found.coverage is not None
    if abs(packed / total - found.coverage.shares.get(8, 0)) > 0.02:
        yield f"8 bits are said of {found.coverage.shares.get(8, 0):.2f} of the weights, and have {packed / total:.2f}"


def in_openvino(name: str) -> Iterator[str]:
    """The export, against torch on a batch of unequal lengths that exceeds the windows of tiny models."""
    import torch

    from overparam import models
    from overparam.compress import quantize

    decoder = _decodes(name)
    model = _causal(name) if decoder else _built(name)
    if reason := quantize.reason_against("openvino-fp32", model, decoder=decoder):
        raise ValueError(reason)
    run = quantize.quantize(model, "openvino-fp32", decoder=decoder).run
    ids = torch.randint(8, 250, (3, 40), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(40)[None] < torch.tensor([40, 7, 23])[:, None]).long()
    with torch.no_grad():
        if decoder:
            run.reset()
            found, expected, mask = run(ids[:1]), model(input_ids=ids[:1]).logits, mask[:1]
        else:
            found, expected = run(ids, mask), model(input_ids=ids, attention_mask=mask)[0]
    error = models.proof.difference(found, expected, mask)
    if not error < 2e-3:
        yield f"the export is off by {error:.1e}"


def _built(name: str) -> Any:
    from overparam import models

    return models.tiny_twin(name)


def _causal(name: str, **overrides: int) -> Any:
    """The model with its language-modelling head; overrides count where the architecture has such fields."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from overparam import models
    from overparam.models.tiny import tiny_config

    config = tiny_config(name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotApplicableError
    try:
        return models.tiny_twin(
            name,
            causal=True,
            **{field: value for field, value in overrides.items() if hasattr(config, field)},
        )
    except (
        AssertionError
    ) as error:  # Reformer writes text only where its configuration says that it is a decoder
        raise NotApplicableError from error


def _decodes(name: str) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from overparam.models.kinds import decodes
    from overparam.models.tiny import tiny_config

    config = tiny_config(name)
    return decodes(config) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


OPERATIONS: dict[str, Callable[[str], Iterator[str]]] = {
    "every depth in one pass": every_depth,
    "leading layers kept": cut(2),
    "other layers kept": cut([0, 2, 3]),
    "half of the experts": pruned_experts,
    "2 bits, simulated": rounded,
    "8 bits, torchao": in_eight_bits,
    "OpenVINO": in_openvino,
}


def page(found: dict[str, dict[str, Outcome]], not_tiny: dict[str, str]) -> str:
    """The page of the table, as Markdown."""
    from transformers import __version__

    marks = {"exact": "exact", "refused": "—", "wrong": "WRONG", None: ""}
    lines = [
        "# Architectures",
        "",
        f"What each operation does with tiny random models of {len(found)} text architectures of transformers "
        f"{__version__}. *exact*: equal to its plain counterpart; —: refused by an error that says why, before any "
        "work; empty: nothing to do there. Written by `python -m tests.benchmarks.architectures`.",
        "",
        f"| architecture | {' | '.join(OPERATIONS)} |",
        f"|---|{'---|' * len(OPERATIONS)}",
    ]
    for name, outcomes in found.items():
        cells = [marks[outcomes.get(what, (None, ""))[0]] for what in OPERATIONS]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "## Why an operation is refused", ""]
    for name, outcomes in found.items():
        reasons: dict[str, list[str]] = {}
        for what, (kind, why) in outcomes.items():
            if kind == "refused":
                reasons.setdefault(why, []).append(what)
        lines += [f"- `{name}`, {', '.join(whats)}: {_cell(why)}" for why, whats in reasons.items()]
    lines += ["", "## Architectures of which no tiny text model was built", ""]
    lines += [f"- `{name}`: {_cell(why)}" for name, why in not_tiny.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:300]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        sys.exit(main())
