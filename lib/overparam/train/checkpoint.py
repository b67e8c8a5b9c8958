"""The state of a training on disk, in safetensors: an interrupted run resumes from it with bit-identical results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overparam.support import files

if TYPE_CHECKING:
    import torch
    from torch import nn

_SCHEDULE = ("steps", "decay")  # may change between runs: a longer run continues a shorter one


def store(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    recipe: Mapping[str, Any],
    log: Mapping[str, Any],
) -> None:
    """Write the state next to the old one, then replace it: if the run is killed, one of the two is there."""
    from safetensors.torch import save_file

    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in state.items()}
    save_file(tensors, temporary / "state.safetensors")
    (temporary / "log.json").write_text(json.dumps({"recipe": recipe, "log": log}))
    files.replace_folder(temporary, folder)


def restore(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """Read the state that `store` left, if there is one, into model and optimizers.

    Args:
        folder: Folder of the state; the older one beside it is read if a run was killed between two renames.
        model: A model with the same parameters.
        optimizers: Optimizers built in the same way.
        recipe: Recipe of this run; only its schedule may differ from the stored one.

    Returns:
        The log; its ``loss`` has one value per step. Empty if there is no state.

    Raises:
        ValueError: The state is of another recipe or model, or has more steps.
    """
    import torch
    from safetensors.torch import load_file

    folders = [each for each in (folder, files.set_aside(folder)) if (each / "log.json").exists()]
    if not folders:
        return {}
    folder = folders[0]
    stored = json.loads((folder / "log.json").read_text())
    differing = sorted(
        name
        for name, value in json.loads(json.dumps(recipe)).items()
        if stored["recipe"].get(name) != value and name not in _SCHEDULE
    )
    if differing:
        raise ValueError(
            f"{folder} was made with another recipe: {', '.join(differing)} differ; use another folder"
        )
    done, steps = len(stored["log"]["loss"]), recipe["steps"]
    if done > steps:
        raise ValueError(f"{folder} holds {done} steps, more than steps = {steps}; use another folder")
    tensors = load_file(folder / "state.safetensors")
    shapes = {f"model.{name}": parameter.shape for name, parameter in model.named_parameters()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items() if name.startswith("model.")}:
        raise ValueError(f"{folder} was made with a model that has other tensors; use another folder")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".", 3)
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    log: dict[str, Any] = stored["log"]
    return log
