"""Adam and AdamW that keep weights and running means in numbers of fewer bits than they compute with.

An update makes float32 of what is stored of a part, has torch's own implementation do its work, and stores the result.
So torch's numbers are changed by the storing alone, and little more than what is stored is in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from training.config import BLOCK, Optimizer
from training.number_formats import EightBit, make_noise, merge, mix, round_stochastically, split
from training.spread import local, spread_like

FUNCTIONS: dict[str, Callable[..., None]] = {"AdamW": adamw, "Adam": adam}
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of the running means of the gradient and of its square
CODES, SCALES, REMAINDER = "_codes", "_scales", "remainder"
# Elements that are dealt with together, with up to 40 bytes each for a moment: many, which keep a GPU busy, or as many
# as the caches of a CPU hold, which takes half the time there.
PART, CPU_PART = 2**23, 2**19

Boxes = Callable[[Tensor], list[tuple[tuple[int, ...], Tensor]]]


@dataclass
class _Part:
    """Some rows of one of the boxes of a parameter that this rank holds."""

    box: int
    rows: slice
    first: tuple[int, int]  # row and column in the whole parameter; a vector is one row
    state: dict[str, Tensor]  # views

    def of(self, boxes: Sequence[tuple[Any, Tensor]]) -> Tensor:
        """Its values among those of all boxes."""
        return _as_matrix(boxes[self.box][1])[self.rows]


class CompactAdam(torch.optim.Optimizer):
    """Adam or AdamW of float32 or bfloat16 parameters, plain or DTensors.

    Its state is there from the start, all zero. As torch's own, the fused implementation takes the attribute
    `found_inf`: float32 `[]` on a device, 1 for a step that changes nothing. It does not wait for the number.

    Args:
        groups: parameters that one call of a foreach implementation can take together.
        section: [optimizer].
        boxes: of a tensor, what this rank holds of it: where each box begins in the whole, and a view of its values.
        key: of a parameter, 63 bits for the noise of stochastic rounding, other ones in each run.
    """

    def __init__(
        self, groups: Sequence[list[nn.Parameter]], section: Optimizer, boxes: Boxes, key: Callable[[Tensor], int]
    ):
        names = ("lr", "eps", "weight_decay")
        defaults = {name: getattr(section, name) for name in names} | {"betas": (section.beta1, section.beta2)}
        super().__init__([{"params": group} for group in groups], defaults)
        self._section, self._boxes, self._key = section, boxes, key
        self._step_supports_amp_scaling = section.implementation == "fused"  # by which torch knows who takes found_inf
        self._formats: dict[torch.device, dict[str, EightBit]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._make_state(parameter)
        self._parts = {parameter: list(self._cut(parameter)) for parameter in self.state}

    def _make_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        held, section = local(parameter), self._section

        def zeros(dtype: torch.dtype, block: int = 1) -> Tensor:
            shape = (*held.shape[:-1], held.shape[-1] // block)
            return spread_like(parameter, torch.zeros(shape, dtype=dtype, device=held.device), block)

        state: dict[str, Tensor] = {}
        for moment in MOMENTS:
            if section.state_dtype == "8bit" and has_blocks(parameter.shape):
                assert held.shape[-1] % BLOCK == 0, f"{tuple(held.shape)} of {tuple(parameter.shape)} cuts a block"
                state |= {moment + CODES: zeros(torch.uint8), moment + SCALES: zeros(torch.float32, BLOCK)}
            else:
                state[moment] = zeros(torch.bfloat16 if section.state_dtype == "bfloat16" else torch.float32)
        if parameter.dtype == torch.bfloat16 and section.bf16_rounding == "remainder":
            state[REMAINDER] = zeros(torch.int16)
        on_device = section.implementation == "fused"  # as torch has it
        return state | {"step": torch.zeros((), device=held.device if on_device else "cpu")}

    def _cut(self, parameter: Tensor) -> Iterator[_Part]:
        boxes = {name: self._boxes(value) for name, value in self.state[parameter].items() if value.dim()}
        for box, (offsets, view) in enumerate(self._boxes(parameter)):
            height, width = _as_matrix(view).shape
            count = max(1, (CPU_PART if view.device.type == "cpu" else PART) // width)
            for start in range(0, height, count):
                rows = slice(start, min(start + count, height))
                first = ((0, *offsets)[-2] + start, offsets[-1])
                state = {name: _as_matrix(values[box][1])[rows] for name, values in boxes.items()}
                yield _Part(box, rows, first, state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; does not wait for the device."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            held = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
            for parameter, gradient in held:
                weights, gradients = self._boxes(parameter), self._boxes(gradient)
                skip = None if found_inf is None else found_inf.to(parameter.device)
                for part in self._parts[parameter]:
                    self._update(group, parameter, part, part.of(weights), part.of(gradients), skip)
            if held:
                steps = [self.state[parameter]["step"] for parameter, _ in held]
                torch._foreach_add_(steps, 1 if found_inf is None else [1 - found_inf] * len(steps))

    def _update(
        self,
        group: Mapping[str, Any],
        parameter: Tensor,
        part: _Part,
        weight: Tensor,
        gradient: Tensor,
        skip: Tensor | None,
    ) -> None:
        # To be skipped, numbers go through all this as they were; but for 8 bits, what is stored of them is the same.
        state, step = part.state, self.state[parameter]["step"]
        exact = (merge(weight, state[REMAINDER]) if REMAINDER in state else weight.float()).contiguous()
        means = [self._unpack(moment, state) for moment in MOMENTS]
        beta1, beta2 = group["betas"]
        FUNCTIONS[self._section.name](
            [exact],
            [gradient.float().contiguous()],
            *([mean] for mean in means),
            [],
            [step.clone()],
            foreach=self._section.implementation == "foreach",
            fused=self._section.implementation == "fused",
            found_inf=skip,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for moment, mean in zip(MOMENTS, means, strict=True):
            self._pack(moment, state, mean, skip)
        if REMAINDER in state:
            exact, remainder = split(exact)
            _store(remainder, state[REMAINDER])
        elif weight.dtype == torch.bfloat16:
            # Of the run, the step, the parameter and the element's place in it, so the same however it is spread.
            key = mix(step.long()) + self._key(parameter)
            noise = make_noise(key, parameter.shape[-1], part.first, (*weight.shape,), weight.device)
            exact = round_stochastically(exact, noise)
        _store(exact, weight)

    def _unpack(self, moment: str, state: Mapping[str, Tensor]) -> Tensor:
        if moment in state:
            return state[moment].float().contiguous()
        codes, scales = state[moment + CODES], state[moment + SCALES]
        return self._format(moment, codes.device).unpack(codes, scales)

    def _pack(self, moment: str, state: Mapping[str, Tensor], mean: Tensor, skip: Tensor | None) -> None:
        if moment in state:
            _store(mean, state[moment])
            return
        for kind, values in zip((CODES, SCALES), self._format(moment, mean.device).pack(mean), strict=True):
            place = state[moment + kind]
            # A block whose largest number is negative gets another scale each time.
            _store(values if skip is None else torch.where(skip > 0, place, values), place)

    def _format(self, moment: str, device: torch.device) -> EightBit:
        if device not in self._formats:
            self._formats[device] = {name: EightBit(name == MOMENTS[0], device) for name in MOMENTS}
        return self._formats[device][moment]

    def exact(self, parameter: nn.Parameter) -> Tensor:
        """A parameter in float32, with the bits that its own number format has no room for; spread as it is."""
        exact = spread_like(parameter, torch.empty_like(local(self.state[parameter][REMAINDER]), dtype=torch.float32))
        boxes = [self._boxes(one) for one in (parameter.detach(), self.state[parameter][REMAINDER], exact)]
        for (_, weight), (_, remainder), (_, values) in zip(*boxes, strict=True):
            values.copy_(merge(weight, remainder))
        return exact


def has_blocks(shape: Sequence[int]) -> bool:
    """Whether the running means of such a parameter are kept in 8 bits: of matrices whose rows are whole blocks."""
    return len(shape) == 2 and shape[1] % BLOCK == 0


def _as_matrix(view: Tensor) -> Tensor:
    return view if view.dim() == 2 else view[None]


def _store(values: Tensor, place: Tensor) -> None:
    if values is not place:  # else it was updated there
        place.copy_(values)
