"""AdamW for bfloat16 weights whose float32 masters cost two more bytes a weight, not four.

A float32 number is its bfloat16 rounding and what that leaves: 16 bits each. The weight of the model is the first, `low` in
the optimizer's state the second, and together they are the master, exactly. So the masters of 7.6 B weights take 14 GiB
beside the weights rather than 28, and no step copies one to the other.

Enters: gradients in float32 (or the weights' type). Leaves: new weights, masters and moments, in one pass over memory. Always
holds: a master is a float32 number, and the weight its nearest bfloat16 (ties away from zero); the moments are float32 or
bfloat16, the arithmetic is float32; a step on CUDA is the Triton kernel of `triton_adamw`, elsewhere `update_` below; on CUDA
the host never waits, also where `found_inf` says that a step is not to be taken.

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Update:
    """The numbers of one step that all weights of a group share."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    found_inf: Tensor
    """float32 scalar on the device: other than 0 where the step is not to be taken."""

    def corrections(self, steps: Tensor) -> Tensor:
        """What corrects the biases of both moments at a step.

        Args:
            steps: float32 [n] on the device, counted from 1.

        Returns:
            float32 [n, 2]: the learning rate over the first moment's bias, and what divides the second one's root.
        """
        counted = steps.double()
        first = self.learning_rate / (1 - self.beta1**counted)
        return torch.stack([first, (1 - self.beta2**counted).sqrt()], dim=1).float()


class MasterAdamW(torch.optim.Optimizer):
    """AdamW over bfloat16 parameters with float32 masters."""

    heeds_found_inf = True
    """A step is left out where the attribute `found_inf`, a float32 scalar on the device, is not 0, as for gradient
    scalers."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        moments: torch.dtype = torch.float32,
        accumulate: bool = False,
    ) -> None:
        """
        Args:
            moments: type in which both moments are kept.
            accumulate: keep a float32 gradient beside every weight for good, into which the model's products add
                (`model.products`); not for parameters sharded by FSDP2, which accumulates by itself.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._accumulate = accumulate
        # All of it now: a checkpoint is loaded into what is there.
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.dtype != torch.bfloat16:
                    raise TypeError(f"a weight of type {weight.dtype}: masters are for bfloat16 weights")
                self.state[weight] = {
                    "step": torch.zeros((), device=weight.device),
                    "low": torch.zeros_like(weight, dtype=torch.int16),
                    "exp_avg": torch.zeros_like(weight, dtype=moments),
                    "exp_avg_sq": torch.zeros_like(weight, dtype=moments),
                }
                if accumulate:
                    weight.grad_dtype = torch.float32
                    weight.grad = torch.zeros_like(weight, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with the gradients that there are, unless `found_inf` says not to."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            steps = [self.state[weight]["step"] for weight in weights]
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None:
                found_inf = torch.zeros((), device=steps[0].device)
            torch._foreach_add_(steps, [(found_inf == 0).float()] * len(steps))
            beta1, beta2 = group["betas"]
            numbers = Update(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], found_inf)
            corrections = numbers.corrections(torch.stack(steps))
            for weight, correction in zip(weights, corrections, strict=True):
                state = self.state[weight]
                update_(
                    _local(weight),
                    _local(state["low"]),
                    _local(weight.grad),
                    _local(state["exp_avg"]),
                    _local(state["exp_avg_sq"]),
                    numbers,
                    correction,
                )
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; those that accumulate are filled with zeros and stay."""
        if not self._accumulate:
            super().zero_grad(set_to_none)
            return
        gradients = [w.grad for group in self.param_groups for w in group["params"] if w.grad is not None]
        torch._foreach_zero_(gradients)

    def masters(self) -> dict[Tensor, Tensor]:
        """float32 masters by weight, as copies."""
        return {weight: join(_local(weight), _local(state["low"])) for weight, state in self.state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer does, but without changing types: torch's own would make bfloat16 of every number."""
        ours = [weight for group in self.param_groups for weight in group["params"]]
        theirs = [index for group in state_dict["param_groups"] for index in group["params"]]
        if [len(g["params"]) for g in self.param_groups] != [len(g["params"]) for g in state_dict["param_groups"]]:
            raise ValueError("loaded state dict contains other parameter groups than the optimizer")
        for weight, index in zip(ours, theirs, strict=True):
            for name, value in state_dict["state"][index].items():
                here = self.state[weight][name]
                if here.dtype != value.dtype:
                    raise ValueError(
                        f"the checkpoint keeps {name} as {value.dtype}, this run as {here.dtype}: set optimizer.moments "
                        "to what the checkpoint was made with"
                    )
                here.copy_(value)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})


def update_(
    weight: Tensor,
    low: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    numbers: Update,
    correction: Tensor,
) -> None:
    """One step of AdamW, in place.

    Args:
        correction: float32 [2] on the device, a row of `Update.corrections`.
    """
    if weight.is_cuda:
        from pipelines.pretrain import triton_adamw

        triton_adamw.update_(weight, low, grad, exp_avg, exp_avg_sq, numbers, correction)
        return
    if bool(numbers.found_inf):
        return
    step_size, root_correction = correction.tolist()
    # Piece by piece, so that the float32 copies stay small.
    for w, rest, g, m, v in zip(
        *(part.flatten().split(1 << 22) for part in (weight, low, grad, exp_avg, exp_avg_sq)), strict=True
    ):
        first = m.float().lerp_(g.float(), 1 - numbers.beta1)
        second = v.float().mul_(numbers.beta2).addcmul_(g.float(), g.float(), value=1 - numbers.beta2)
        m.copy_(first)
        v.copy_(second)
        master = join(w, rest).mul_(1 - numbers.learning_rate * numbers.weight_decay)
        root = second.sqrt().div_(root_correction).add_(numbers.epsilon)
        split_(master.addcdiv_(first, root, value=-step_size), w, rest)


def join(weight: Tensor, low: Tensor) -> Tensor:
    """The float32 masters of bfloat16 weights and what their rounding left."""
    return ((weight.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def split_(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """Write float32 masters as bfloat16 weights and what their rounding leaves."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    weight.view(torch.int16).copy_(high)
    low.copy_(bits - (high << 16))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
