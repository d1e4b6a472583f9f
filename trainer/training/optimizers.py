"""Optimizers with less state than two float32 numbers a parameter, and how their state goes into a checkpoint."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from llava_llama31.trainer.distributed.parameters import sharded_like, unsharded
from llava_llama31.trainer.model.module_groups import group_parameters


# numbers that are updated at once: temporary float32 copies stay small beside the weights
_CHUNK = 2**24


def parameter_groups(
    target: torch.nn.Module,
    base: torch.nn.Module,
    learning_rates: Mapping[str, float],
    weight_decay: float,
    decaying: Collection[str] | None,
) -> list[dict[str, Any]]:
    """The trained parameters as torch.optim takes them: a learning rate per module group, decay or none.

    Args:
        target: the model as it is trained, wrappers included.
        base: the model without wrappers and adapters.
        learning_rates: by module group.
        decaying: names in `target` of what weight decay applies to; None: everything.
    """
    name_of = {id(parameter): name for name, parameter in target.named_parameters()}
    names = None if decaying is None else set(decaying)
    groups = []
    for group, learning_rate in learning_rates.items():
        trained = [parameter for _, parameter in group_parameters(base, group) if parameter.requires_grad]
        for decays in (True, False):
            chosen = [p for p in trained if (names is None or name_of[id(p)] in names) == decays]
            if chosen:
                decay = weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": learning_rate, "weight_decay": decay})
    return groups


class AdamWBfloat16(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) whose two moments are bfloat16, rounded up or down by chance.

    Rounded to nearest, the second moment would stand still: at beta2 = 0.999 its changes are smaller than half of
    bfloat16's spacing. By chance it is right on average (Zamirai et al., 2020, arXiv:2010.06192). Weights in bfloat16
    are rounded so too; float32 weights are not rounded. The chance is a function of the step and of the parameter's
    place alone: all processes round alike, and so does a resumed run.

    Args:
        groups: of parameters, as torch.optim.AdamW takes them.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)
        return loss

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        chance = torch.Generator(parameter.device).manual_seed((state["step"] << 24) + place)
        (beta1, beta2), rate = group["betas"], group["lr"]
        rest1, rest2 = (1 - beta ** state["step"] for beta in (beta1, beta2))
        flat = (x.view(-1).split(_CHUNK) for x in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        for weight, mean, square, grad in zip(*flat, parameter.grad.reshape(-1).split(_CHUNK), strict=True):
            wide = grad.float()
            new_mean = mean.float().lerp_(wide, 1 - beta1)
            new_square = square.float().mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
            new_weight = weight.float() * (1 - rate * group["weight_decay"])
            deviation = (new_square / rest2).sqrt_().add_(group["eps"])
            new_weight.addcdiv_(new_mean, deviation, value=-rate / rest1)
            for target, source in ((weight, new_weight), (mean, new_mean), (square, new_square)):
                target.copy_(round_by_chance(source, chance) if target.dtype == torch.bfloat16 else source)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the parent's, which gives the moments the type of their parameter."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)


def round_by_chance(x: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Float32 numbers as bfloat16: one of the two neighbours, the nearer one the more often; right on average."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=chance, device=x.device, dtype=torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    # the noise would carry a NaN over into another number
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def portable_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's `state_dict` of plain tensors: torchao's 8-bit ones are taken apart, sharded ones are gathered.

    All processes call this together.
    """
    content = optimizer.state_dict()
    state = {
        number: {name: _apart(value) for name, value in entry.items()} for number, entry in content["state"].items()
    }
    return {**content, "state": state}


def load_portable_state(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Undo `portable_state`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: sharded_like(_together(value), parameters[number]) for name, value in entry.items()}
        for number, entry in content["state"].items()
    }
    optimizer.load_state_dict({**content, "state": state})


def _apart(value: Any) -> Any:
    value = unsharded(value)
    if not isinstance(value, torch.Tensor) or type(value) is torch.Tensor:
        return value
    from torchao.optim.subclass_8bit import OptimState8bit

    if not isinstance(value, OptimState8bit):
        raise TypeError(f"the optimizer's state holds a {type(value).__name__}, which has no place in a checkpoint")
    return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}


def _together(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(value["codes"], value["scale"], value["qmap"], value["signed"])
