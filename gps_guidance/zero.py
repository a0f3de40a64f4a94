"""DeepSpeed's ZeRO, stages 1 and 2: each process keeps a part of the moments, and of the gradients.

Weights and their moving average stay whole in every process. DeepSpeed's engine adds up gradients,
clips and steps; schedule, averaging and checkpoints are the loop's. What is written to disk is
whole.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import compare_versions, is_deepspeed_available
from torch import Tensor

log = logging.getLogger(__name__)

TESTED = "0.19.8"  # earlier releases take steps in single precision that are not finite
INSTALL = '`pip install "gps-guidance[deepspeed]"`'
LAUNCH = "`accelerate launch --use_deepspeed --zero_stage 2`"
INSTEAD = "FSDP shares the weights too: `accelerate launch --use_fsdp --fsdp_version 2`."
BUCKET = 50_000_000  # numbers sent at once: 200 MB, for which each process has a buffer


def zero_stage() -> int:
    """The stage that accelerate is configured for; it says so by the environment. ValueError for
    what of its configuration this loop does not know, or if DeepSpeed is not installed."""
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise ValueError("accelerate is configured with a deepspeed_config_file, but the recipe "
                         f"says what it would: leave it out and give zero_stage, as {LAUNCH} does.")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2"):
        raise ValueError(f"accelerate is configured for DeepSpeed with zero_stage {stage}, and 1 "
                         f"and 2 are known: {LAUNCH}. {INSTEAD}")
    for what in ("optimizer", "param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        if device != "none":
            raise ValueError(f"accelerate is configured with offload_{what}_device {device}, which "
                             f"this loop does not know: set it to none. {INSTEAD}")
    if not is_deepspeed_available():
        raise ValueError("accelerate is configured for DeepSpeed, which is not installed: run "
                         f"{INSTALL}.")
    if compare_versions("deepspeed", "<", TESTED):
        raise ValueError(f"The DeepSpeed that is installed is older than {TESTED}: run {INSTALL}.")
    return int(stage)


class Zero:
    """A module that gives a loss, in DeepSpeed's engine: what DDP would be, and the steps too.

    ``optimizer`` has moments of whole parameters, or none yet, and from here on those of this
    process's part of each group, one flat tensor. ``named`` are all parameters by name.
    """

    def __init__(self, objective: torch.nn.Module, optimizer: torch.optim.Optimizer,
                 named: Mapping[str, torch.nn.Parameter], max_norm: float) -> None:
        import deepspeed

        stage = zero_stage()
        moments = {p: optimizer.state.pop(p) for p in named.values() if p in optimizer.state}
        groups = [group["params"] for group in optimizer.param_groups]
        self.names = {parameter: name for name, parameter in named.items()}
        self.optimizer = optimizer
        self.engine = deepspeed.initialize(model=objective, optimizer=optimizer, config={
            "train_micro_batch_size_per_gpu": 1,  # for its log alone
            "gradient_clipping": max_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET,
                                  "allgather_bucket_size": BUCKET},
        })[0]
        flats = [group["params"][0] for group in optimizer.param_groups]
        self.groups = list(zip(flats, groups, strict=True))
        self._share(moments)
        log.info("DeepSpeed %s, ZeRO stage %d", deepspeed.__version__, stage)

    def __call__(self, part: Any) -> Tensor:
        loss: Tensor = self.engine(part)
        return loss

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the block add up. Stage 2 sends them each time."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def step(self, loss: float) -> float:
        """Clip the gradient and step, if the ``loss``, the same in all processes, and the
        gradient's norm are finite; returns the norm."""
        from deepspeed.utils import safe_set_full_grad

        if not math.isfinite(loss):  # the engine itself looks at the gradient alone
            some = next(iter(self.names))
            safe_set_full_grad(some, torch.full_like(some, math.nan))
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's tensors as ``<kind>.<name>``, whole, in the main process on the CPU; none
        in the others. All processes must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        for flat, group in self.groups:
            state = self._linked(flat, group)
            for parameter in group:
                for kind, value in state.items():
                    tensor = (safe_get_full_optimizer_state(parameter, kind) if value.ndim else
                              value.clone())  # the count of steps is the whole group's
                    if self.engine.global_rank == 0:
                        found[f"{kind}.{self.names[parameter]}"] = tensor.cpu()
        return found

    def release(self) -> None:
        """Give the parameters back, each with memory of its own."""
        self.engine.destroy()
        for parameter in self.names:
            parameter.data = parameter.data.clone()

    def _share(self, moments: Mapping[torch.nn.Parameter, dict[str, Tensor]]) -> None:
        """Take this process's part of whole moments."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for flat, group in self.groups:
            known = [parameter for parameter in group if parameter in moments]
            for kind, value in moments[known[0]].items() if known else ():
                self.optimizer.state[flat][kind] = (
                    torch.zeros_like(flat, requires_grad=False) if value.ndim else value)
            self._linked(flat, group)
            for parameter in known:
                for kind, value in moments[parameter].items():
                    if value.ndim:
                        safe_set_full_optimizer_state(parameter, value, kind)

    def _linked(self, flat: Tensor, group: list[torch.nn.Parameter]) -> dict[str, Tensor]:
        """The optimiser's state of a part, where DeepSpeed's functions find it as that of the
        group's parameters; the engine does so for the first group alone."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        lazy_init_hp_params_optimizer_state(group, flat, self.optimizer.state)
        state: dict[str, Tensor] = self.optimizer.state[flat]
        return state
