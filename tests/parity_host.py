"""Runs inside threestudio for test_parity.py: ``python parity_host.py JOB`` in its folder.

JOB is a folder with ``job.json`` and ``field.pt``; what threestudio computes goes to
``found.safetensors`` there.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path.cwd())]

from gps_guidance.nocompile import host  # noqa: E402

host.prepare()
host.load_extension()

import threestudio  # noqa: E402
from threestudio.utils.config import load_config  # noqa: E402
from threestudio.utils.misc import C  # noqa: E402


def cameras(data: Any, seed: int, when: tuple[int, int]) -> dict[str, Any]:
    """A training batch. Which of the two ways of drawing elevations is threestudio's own draw from
    ``random``; ours takes it from torch, so that one number of torch's is used up here."""
    data.train_dataset.update_step(*when)
    torch.manual_seed(seed)
    chosen = float(torch.rand(()))
    given, random.random = random.random, lambda: chosen
    try:
        batch: dict[str, Any] = data.train_dataset.collate(None)
    finally:
        random.random = given
    return batch


class Reseeded:
    """The guidance with torch seeded before each call: renders use up other numbers."""

    def __init__(self, guidance: Any) -> None:
        self.guidance = guidance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(7)
        return self.guidance(*args, **kwargs)


def copy_into(module: torch.nn.Module, tensors: list[torch.Tensor]) -> None:
    """Set the parameters of a module, in order."""
    own = list(module.parameters())
    assert [p.shape for p in own] == [t.shape for t in tensors], (own, tensors)
    with torch.no_grad():
        for parameter, tensor in zip(own, tensors, strict=True):
            parameter.copy_(tensor)


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    field = torch.load(folder / "field.pt", weights_only=True)
    cfg = load_config(job["config"], cli_args=job["overrides"], n_gpus=1)
    found: dict[str, Any] = {}
    now = tuple(job["now"])

    for k, value in enumerate(job["schedules"]):
        schedule = OmegaConf.create(value) if isinstance(value, list) else value
        found[f"schedule.{k}"] = torch.tensor(
            [C(schedule, epoch, step) for epoch, step in job["when"]])

    data = threestudio.find(cfg.data_type)(cfg.data)
    data.setup()
    for seed in job["seeds"]:
        batch = cameras(data, seed, now)
        found |= {f"train.{seed}.{key}": value for key, value in batch.items()
                  if isinstance(value, torch.Tensor)}
    for name in ("val", "test"):
        views = getattr(data, f"{name}_dataset")
        for k in range(len(views)):
            one = views.collate([views[k]])
            found |= {f"{name}.{k}.{key}": value for key, value in one.items()
                      if isinstance(value, torch.Tensor)}

    system = threestudio.find(cfg.system_type)(cfg.system)
    for part in ("geometry", "background"):
        copy_into(getattr(system, part), field[part])
    system.do_update_step(*now)
    logged: dict[str, Any] = {}
    system.log = lambda name, value, **kwargs: logged.update({name: value})
    system.C = lambda value: C(value, *now)
    system.on_fit_start()
    system.guidance.update_step(*now)
    encoder = getattr(getattr(system.guidance, "guidance", None), "gps_encoder", None)
    if encoder is not None:
        encoder.register_forward_pre_hook(
            lambda module, inputs: found.update({"received": inputs[0].detach().float()}))
    system.guidance = Reseeded(system.guidance)
    outputs: dict[str, Any] = {}
    system.renderer.register_forward_hook(lambda module, inputs, out: outputs.update(out))
    system.train()
    for shading in job["shadings"]:
        system.zero_grad()
        batch = cameras(data, job["seeds"][0], now)
        forward = system.material.forward
        system.material.forward = lambda *a, s=shading, f=forward, **k: f(*a, **k | {"shading": s})
        loss = system.training_step(batch, 0)["loss"]
        system.material.forward = forward
        loss.backward()
        found |= {f"{shading}.out.{key}": value.detach() for key, value in outputs.items()
                  if isinstance(value, torch.Tensor)}
        found |= {f"{shading}.{key}": torch.as_tensor(value, dtype=torch.float32).detach()
                  for key, value in logged.items()}
        found[f"{shading}.loss"] = loss.detach()
        for part in ("geometry", "background"):
            grads = [p.grad for p in getattr(system, part).parameters()]
            found |= {f"{shading}.grad.{part}.{k}": g for k, g in enumerate(grads)}
    outputs.clear()
    system.eval()
    with torch.no_grad():
        one = data.test_dataset.collate([data.test_dataset[1]])
        system(one)
    found |= {f"eval.{key}": value for key, value in outputs.items()
              if isinstance(value, torch.Tensor)}
    embedded = system.prompt_processor().get_text_embeddings(
        *(torch.tensor(values) for values in job["views"]), True)
    found["text"] = embedded
    save_file({key: value.clone().contiguous() for key, value in found.items()},
              folder / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
