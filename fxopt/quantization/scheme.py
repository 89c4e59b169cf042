"""A quantization scheme: which integers there are, and the scale and zero point of a range.

    symmetric   q = clamp(round(x / s), qmin, qmax)          s = max(−low, high) / qmax
    affine      q = clamp(round(x / s) + z, qmin, qmax)      s = (high − low) / (qmax − qmin)
                                                             z = round(qmin − low / s)

(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, section 3.) A range is first widened to contain 0, so that 0 is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.errors import OptionError, check_option

_LARGEST_FLOAT = torch.finfo(torch.float32).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # 2⁻¹²⁶: normal, and its reciprocal is finite
_LARGEST_RESULT = _LARGEST_FLOAT * (1 - 2**-22)  # leaves room for the rounding of the scale


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The integers that stand for a tensor's numbers.

    `symmetric` schemes have the zero point 0 and as many integers below it as above, so they are
    signed. `per_channel` asks for a scale for each output channel of a weight.
    """

    bits: int = 8
    symmetric: bool
    signed: bool
    per_channel: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.bits, int) and not isinstance(self.bits, bool)
        good = whole and 2 <= self.bits <= 16
        check_option("Scheme", good, "bits", self.bits, "a whole number from 2 to 16")
        for name in ("symmetric", "signed", "per_channel"):
            value = getattr(self, name)
            check_option("Scheme", isinstance(value, bool), name, value, "True or False")
        good = self.signed or not self.symmetric
        check_option(
            "Scheme", good, "signed", self.signed, "True, since symmetric=True; or symmetric=False"
        )

    @property
    def qmin(self) -> int:
        """The smallest integer."""
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + int(self.symmetric)

    @property
    def qmax(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - int(self.signed)) - 1

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "affine"
        sign = "signed" if self.signed else "unsigned"
        return f"{self.bits}-bit {kind}, {sign}" + (", per channel" if self.per_channel else "")

    def parameters(self, low: float, high: float) -> tuple[float, int]:
        """Return the scale, a float32 number, and the zero point of the range from low to high.

        Raise OptionError where a bound is not finite, or low is above high.
        """
        scale, zero_point = self.tensor_parameters(
            torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
        )
        return scale.item(), int(zero_point.item())

    def tensor_parameters(
        self, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales (float32) and zero points (int32) of ranges of one shape, of that shape.

        A range without width holds 0 alone, which every scale represents: it gets the scale 1.
        No scale is below 2⁻¹²⁶, so a range of less than that many steps is represented coarsely.
        Near float32's largest number a scale is made a little smaller where the outermost integer
        would stand for infinity; the end of the range is then clipped by up to half a step.

        Raise OptionError where a bound is not finite, or low is above high.
        """
        low, high = low.detach().double(), high.detach().double()
        self._check(low, high)
        low, high = low.clamp(-_LARGEST_FLOAT, 0), high.clamp(0, _LARGEST_FLOAT)
        if self.symmetric:
            width, steps = torch.maximum(-low, high), self.qmax
        else:
            width, steps = high - low, self.qmax - self.qmin
        scale = (width / steps).clamp_(min=_SMALLEST_SCALE).float()
        scale = torch.where(width > 0, scale, 1.0)
        if self.symmetric:
            zero_point = torch.zeros_like(width)
        else:
            zero_point = (self.qmin - low / scale.double()).round_().clamp_(self.qmin, self.qmax)
        outermost = torch.maximum(zero_point - self.qmin, self.qmax - zero_point)
        scale = torch.minimum(scale, (_LARGEST_RESULT / outermost).float())
        return scale, zero_point.int()

    def _check(self, low: torch.Tensor, high: torch.Tensor) -> None:
        good = torch.isfinite(low) & torch.isfinite(high) & (low <= high)
        if not bool(good.all()):
            bad = int(torch.nonzero(~good.reshape(-1))[0])
            pair = float(low.reshape(-1)[bad]), float(high.reshape(-1)[bad])
            place = f", number {bad} of {good.numel()}," if good.numel() > 1 else ""
            raise OptionError(
                f"A range from {pair[0]} to {pair[1]}{place} cannot be quantized ({self}); give "
                "finite bounds of which the first is not above the second."
            )
