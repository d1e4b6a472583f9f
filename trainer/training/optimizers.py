"""A stage's parameter groups, and optimizers with small state."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.packed_llama_llava_llama31 import to_device
from llava_llama31.trainer.distributed.parameters import held_part, num_before
from llava_llama31.trainer.model.device_options import compiles
from llava_llama31.trainer.model.module_groups import group_parameters


# numbers that are updated at once: temporary float32 copies stay small beside the weights
_CHUNK = 2**24


def parameter_groups(
    target: torch.nn.Module,
    base: LlavaNextForConditionalGeneration,
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


def make_optimizer(
    kind: Callable[..., torch.optim.Optimizer],
    groups: Iterable[dict[str, Any]],
    options: Mapping[str, Any],
    *,
    bfloat16_moments: bool,
    device: torch.device,
) -> torch.optim.Optimizer:
    """What Transformers has chosen, `kind` with `options`, or AdamWBfloat16 with these."""
    if not bfloat16_moments:
        return kind(groups, **options)
    compiled = torch.compile if compiles(device) else None
    return AdamWBfloat16(groups, options["lr"], options["betas"], options["eps"], compiled=compiled)


class AdamWBfloat16(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) whose two moments are bfloat16 with stochastic rounding.

    Rounded to nearest, the second moment would never change: at beta2 = 0.999 its updates are smaller than half of
    bfloat16's spacing. Rounded stochastically it is right on average (Zamirai et al., 2020, arXiv:2010.06192). Weights
    in bfloat16 are rounded in the same way; float32 weights are not rounded. The random numbers depend only on the
    step and the parameter's position: all processes round alike, and so does a resumed run. Of sharded parameters, and
    on a GPU, they depend on a number's place in its parameter too, and not on how it is sharded.

    Args:
        groups: of parameters, as torch.optim.AdamW takes them.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        compiled: makes one kernel of a parameter's update, as torch.compile does; None: the device can't.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        compiled: Callable[[Any], Any] | None = None,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._fused = None if compiled is None else compiled(update_in_place)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                if self._fused is not None or isinstance(parameter, DTensor):
                    self._update_by_place(parameter, parameter.grad, group, place)
                else:
                    self._update(parameter, parameter.grad, group, place)
        return loss

    def _update_by_place(
        self, parameter: torch.nn.Parameter, grad: torch.Tensor, group: dict[str, Any], place: int
    ) -> None:
        state = self.state[parameter]
        tensors = [held_part(x).view(-1) for x in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        tensors.append(held_part(grad).reshape(-1))
        (beta1, beta2), rate = group["betas"], group["lr"]
        rest1, rest2 = (1 - beta ** state["step"] for beta in (beta1, beta2))
        factors = (
            1 - rate * group["weight_decay"],
            1 - beta1,
            beta2,
            1 - beta2,
            1 / rest2,
            group["eps"],
            rate / rest1,
        )
        numbers = to_device(torch.tensor(factors, dtype=torch.float32), tensors[0].device)
        first = num_before(parameter)
        size = max(1, len(tensors[0])) if self._fused is not None else _CHUNK
        for begin in range(0, len(tensors[0]), size):
            seeds = to_device([(state["step"] << 24) + place, first + begin], tensors[0].device)
            weight, mean, square, wide = (x[begin : begin + size] for x in tensors)
            (self._fused or update_in_place)(weight, mean, square, wide, numbers, seeds)

    def _update(self, parameter: torch.nn.Parameter, grad: torch.Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        generator = torch.Generator(parameter.device).manual_seed((state["step"] << 24) + place)
        (beta1, beta2), rate = group["betas"], group["lr"]
        rest1, rest2 = (1 - beta ** state["step"] for beta in (beta1, beta2))
        flat = (x.view(-1).split(_CHUNK) for x in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        for weight, mean, square, part in zip(*flat, grad.reshape(-1).split(_CHUNK), strict=True):
            wide = part.float()
            new_mean = mean.float().lerp_(wide, 1 - beta1)
            new_square = square.float().mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
            new_weight = weight.float() * (1 - rate * group["weight_decay"])
            deviation = (new_square / rest2).sqrt_().add_(group["eps"])
            new_weight.addcdiv_(new_mean, deviation, value=-rate / rest1)
            for target, source in ((weight, new_weight), (mean, new_mean), (square, new_square)):
                target.copy_(round_stochastically(source, generator) if target.dtype == torch.bfloat16 else source)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the parent's, but with the moments in bfloat16 and not in their parameter's dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)


def round_stochastically(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 numbers rounded stochastically to bfloat16: to a neighbour, more likely to the nearer one."""
    return _rounded(x, torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32))


def update_in_place(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    grad: torch.Tensor,
    numbers: torch.Tensor,
    seeds: torch.Tensor,
) -> None:
    """AdamWBfloat16's step of a flat parameter, in operations that torch.compile makes one kernel of.

    Args:
        numbers: (7,) what remains of the weight, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta2^step), epsilon,
            rate / (1 - beta1^step).
        seeds: (2,) of the step and parameter; the place of the first number.
    """
    remains, new, old_square, new_square, correction, eps, rate = numbers.unbind()
    wide = grad.float()
    means = mean.float() + (wide - mean.float()) * new
    squares = square.float() * old_square + wide * wide * new_square
    weights = weight.float() * remains - rate * means / ((squares * correction).sqrt() + eps)
    bits = _hashed(torch.arange(weight.numel(), device=weight.device) + seeds[1], seeds[0])
    mean.copy_(_rounded(means, bits & 0xFFFF))
    square.copy_(_rounded(squares, (bits >> 16) & 0xFFFF))
    weight.copy_(_rounded(weights, (bits >> 32) & 0xFFFF) if weight.dtype == torch.bfloat16 else weights)


def _hashed(places: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """64 random bits for each place: SplitMix64 (Steele, Lea and Flood, 2014), in integers that wrap around."""
    bits = (places + (seed << 40 ^ seed)) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        bits = (bits ^ (bits >> shift) & ((1 << 64 - shift) - 1)) * factor
    return bits ^ (bits >> 31) & ((1 << 33) - 1)


def _rounded(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """float32 numbers rounded to bfloat16 by 16 random bits each, which would carry a NaN over into another number."""
    rounded = ((x.view(torch.int32) + noise.to(torch.int32)) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
