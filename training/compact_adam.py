"""Adam and AdamW that keep weights and running means in numbers of fewer bits than they compute with.

A step takes a bucket of parts at a time, makes float32 of what is stored, has torch's own implementation do the update,
and stores the result. So torch's numbers are changed by the storing alone, and little more than what is stored is in
memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
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
BUCKET = 2**23  # elements that are dealt with together, and up to as many more; 40 bytes each, for a moment

Boxes = Callable[[Tensor], list[tuple[tuple[int, ...], Tensor]]]


@dataclass
class _Part:
    """Some rows of one of the boxes of a parameter that this rank holds."""

    parameter: nn.Parameter
    box: int
    rows: slice
    first: tuple[int, int]  # row and column in the whole parameter; a vector is one row
    shape: tuple[int, int]
    state: dict[str, Tensor]  # views

    def of(self, views: Sequence[tuple[Any, Tensor]]) -> Tensor:
        """Its values among those of all boxes."""
        return _as_matrix(views[self.box][1])[self.rows]


class CompactAdam(torch.optim.Optimizer):
    """Adam or AdamW of float32 or bfloat16 parameters, plain or DTensors.

    Its state is there from the start, all zero.

    Args:
        groups: parameters that one call of a fused or foreach implementation can take together.
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
        self._eight_bit: dict[torch.device, tuple[EightBit, EightBit]] = {}  # for the two means
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._make_state(parameter)
        self._buckets = [list(self._make_buckets(group["params"])) for group in self.param_groups]

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

    def _make_buckets(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[_Part]]:
        """Parts of one format and device, in the order of the parameters."""
        kinds: dict[Any, list[_Part]] = {}
        for parameter in parameters:
            state = {name: value for name, value in self.state[parameter].items() if value.dim()}
            kind = (tuple(state), local(parameter).device)
            kinds.setdefault(kind, []).extend(self._cut(parameter, state))
        for parts in kinds.values():
            ends = accumulate(part.shape[0] * part.shape[1] for part in parts)
            for _, bucket in groupby(zip(parts, ends, strict=True), lambda one: one[1] // BUCKET):
                yield [part for part, _ in bucket]

    def _cut(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> Iterator[_Part]:
        boxes = {name: self._boxes(value) for name, value in state.items()}
        for box, (offsets, view) in enumerate(self._boxes(parameter)):
            height, width = _as_matrix(view).shape
            count = max(1, BUCKET // width)
            for start in range(0, height, count):
                rows = slice(start, min(start + count, height))
                first = ((0, *offsets)[-2] + start, offsets[-1])
                views = {name: _as_matrix(values[box][1])[rows] for name, values in boxes.items()}
                yield _Part(parameter, box, rows, first, (rows.stop - start, width), views)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; does not wait for the device."""
        for group, buckets in zip(self.param_groups, self._buckets, strict=True):
            held = [parameter for parameter in group["params"] if parameter.grad is not None]
            weights = {parameter: self._boxes(parameter) for parameter in held}
            gradients = {parameter: self._boxes(parameter.grad) for parameter in held}
            for bucket in buckets:
                if parts := [part for part in bucket if part.parameter in weights]:
                    of_weights = [part.of(weights[part.parameter]) for part in parts]
                    of_gradients = [part.of(gradients[part.parameter]) for part in parts]
                    self._update(group, parts, of_weights, of_gradients)
            if held:
                torch._foreach_add_([self.state[parameter]["step"] for parameter in held], 1)

    def _update(
        self, group: dict[str, Any], parts: list[_Part], weights: list[Tensor], gradients: list[Tensor]
    ) -> None:
        """Computes with all parts of a bucket in one row of numbers each: of weights, of gradients, of both means."""
        sizes = [weight.numel() for weight in weights]
        steps = torch.stack([self.state[part.parameter]["step"] for part in parts])
        means = [self._unpack(moment, parts) for moment in MOMENTS]
        exact = _join(weights)
        exact = merge(exact, _stored(parts, REMAINDER)) if REMAINDER in parts[0].state else exact.float()
        rows = [values.split(sizes) for values in (exact, _join(gradients).float(), *means)]
        beta1, beta2 = group["betas"]
        FUNCTIONS[self._section.name](
            *rows,
            [],
            steps.clone().unbind(),
            foreach=self._section.implementation == "foreach",
            fused=self._section.implementation == "fused",
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for moment, values in zip(MOMENTS, means, strict=True):
            self._pack(moment, parts, values)
        if REMAINDER in parts[0].state:
            exact, remainder = split(exact)
            _store(remainder, [part.state[REMAINDER] for part in parts])
        elif weights[0].dtype == torch.bfloat16:
            exact = round_stochastically(exact, self._make_noise(parts, steps, exact.device))
        _store(exact, weights)

    def _unpack(self, moment: str, parts: list[_Part]) -> Tensor:
        if moment in parts[0].state:
            return _stored(parts, moment).float()
        codes, scales = _stored(parts, moment + CODES), _stored(parts, moment + SCALES)
        return self._format(moment, codes.device).unpack(codes, scales)

    def _pack(self, moment: str, parts: list[_Part], values: Tensor) -> None:
        packed = [values] if moment in parts[0].state else self._format(moment, values.device).pack(values)
        kinds = [moment] if moment in parts[0].state else [moment + CODES, moment + SCALES]
        for kind, numbers in zip(kinds, packed, strict=True):
            _store(numbers, [part.state[kind] for part in parts])

    def _format(self, moment: str, device: torch.device) -> EightBit:
        if device not in self._eight_bit:
            self._eight_bit[device] = EightBit(True, device), EightBit(False, device)
        return self._eight_bit[device][MOMENTS.index(moment)]

    def _make_noise(self, parts: list[_Part], steps: Tensor, device: torch.device) -> Tensor:
        """Of the run, the step, the parameter and the element's place in it, so the same however it is spread."""
        return _join(
            [
                make_noise(step + self._key(part.parameter), part.parameter.shape[-1], part.first, part.shape, device)
                for part, step in zip(parts, mix(steps.long()).unbind(), strict=True)
            ]
        )

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


def _join(views: list[Tensor]) -> Tensor:
    return torch.cat([view.reshape(-1) for view in views])


def _stored(parts: list[_Part], kind: str) -> Tensor:
    return _join([part.state[kind] for part in parts])


def _store(values: Tensor, views: list[Tensor]) -> None:
    pieces = values.split([view.numel() for view in views])
    torch._foreach_copy_(views, [piece.view(view.shape) for piece, view in zip(pieces, views, strict=True)])
