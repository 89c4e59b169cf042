"""Where the rules of remove-no-ops fire, and where they hold back."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.testing import Example

aten = torch.ops.aten
NO_REASON = "does not apply"

EXAMPLES: dict[str, list[Example]] = {
    "remove_dropout": [
        Example(lambda x: F.dropout(x, 0.5, training=False).sin(), (3, 4)),
        Example(lambda x: F.alpha_dropout(x, 0.5, training=False).sin(), (3, 4)),
        Example(lambda x: F.dropout(x, 0.5, training=True).sin(), (3, 4), reason="found True"),
    ],
    "remove_copy": [
        Example(lambda x: x.clone().sin(), (3, 4)),
        Example(lambda x: x.mT.contiguous().sin(), (3, 4)),
        Example(
            lambda x: x.clone(memory_format=torch.channels_last).sin(), (2, 3, 4, 5),
            reason="it asks for the memory layout torch.channels_last",
        ),
        Example(lambda x: (x.clone(), x.sin()), (3, 4), reason="would be args_0 itself"),
    ],
    "remove_cast": [
        Example(lambda x: x.to(x.dtype).sin(), (3, 4)),
        Example(lambda x: x.to(torch.int32) + 1, torch.arange(4), reason=NO_REASON),
    ],
    "remove_detach": [
        Example(lambda x: x.detach() + 1, torch.arange(4)),
        Example(lambda x: x.detach().sin(), (3, 4), reason="it stops the gradient of"),
    ],
    "remove_reshape": [
        Example(lambda x: x.reshape(3, 4).sin(), (3, 4)),
        Example(lambda x: F.adaptive_avg_pool2d(x, (4, 5)).sin(), (2, 3, 4, 5)),
        Example(lambda x: x.reshape(4, 3).sin(), (3, 4), reason=NO_REASON),
    ],
    "remove_pad": [
        Example(lambda x: F.pad(x, (0, 0)).sin(), (3, 4)),
        Example(lambda x: F.pad(x, (1, -1)).sin(), (3, 4), reason=NO_REASON),
    ],
    "remove_roll": [
        Example(lambda x: torch.roll(x, 0, 1).sin(), (3, 4)),
        Example(lambda x: torch.roll(x, 1, 1).sin(), (3, 4), reason=NO_REASON),
    ],
    "remove_flip": [
        Example(lambda x: torch.flip(x, [1]).sin(), (3, 1)),
        Example(lambda x: torch.flip(x, [1]).sin(), (3, 4), reason=NO_REASON),
    ],
    "remove_permute": [
        Example(lambda x: x.permute(0, 1, 2).sin(), (2, 3, 4)),
        Example(lambda x: x.permute(0, 2, 1).sin(), (2, 3, 4), reason=NO_REASON),
    ],
    "merge_permutes": [
        Example(lambda x: x.permute(2, 0, 1).permute(2, 0, 1).sin(), (2, 3, 4)),
        Example(lambda x: x.permute(2, 0, 1).permute(1, 2, 0).sin(), (2, 3, 4)),
        Example(lambda x: x.permute(2, 0, 1).sin(), (2, 3, 4), reason="permute wanted"),
    ],
    "remove_upsample": [
        Example(lambda x: F.interpolate(x, size=(4, 5)).sin(), (2, 3, 4, 5)),
        Example(lambda x: F.interpolate(x, size=(8, 5)).sin(), (2, 3, 4, 5), reason=NO_REASON),
        Example(
            lambda x: F.interpolate(x, scale_factor=1.1).sin(), (2, 3, 4, 5),
            reason="which may read other pixels",
        ),
    ],
    "keep_smooth_upsample": [
        Example(
            lambda x: F.interpolate(x, size=(4, 5), mode="bilinear").sin(), (2, 3, 4, 5),
            reason="beside an infinite pixel it answers nan",
        ),
    ],
    "remove_zero": [
        Example(lambda x: (x + 0).sin(), (3, 4)),
        Example(lambda x: (x - torch.zeros_like(x)).sin(), (3, 4)),
        Example(lambda x: (x + 1e-9).sin(), (3, 4), reason="0 wanted, found 1e-09"),
    ],
    "remove_one": [
        Example(lambda x: (x * 1).sin(), (3, 4)),
        Example(lambda x: (x / 1).sin(), (3, 4)),
        Example(lambda x: (x**1).sin(), (3, 4)),
        Example(lambda x: (x * torch.ones(4)).sin(), (3, 4)),
        Example(
            lambda x: x * 1 + 2, torch.arange(4) * 1j, reason="infinities times 1 have nan parts"
        ),
    ],
    "remove_single_cat": [
        Example(lambda x: torch.cat([x], 1).sin(), (3, 4)),
        Example(lambda x: torch.cat([x, x], 1).sin(), (3, 4), reason=NO_REASON),
    ],
    "remove_single_stack": [
        Example(lambda x: torch.stack([x], 1).sin(), (3, 4)),
        Example(lambda x: torch.stack([x, x], 1).sin(), (3, 4), reason=NO_REASON),
    ],
    "remove_single_split": [
        Example(lambda x: torch.split(x, 4, 1)[0].sin(), (3, 4)),
        Example(lambda x: torch.split(x, 2, 1)[0].sin(), (3, 4), reason=NO_REASON),
    ],
    "remove_split_of_cat": [
        Example(
            lambda x, y: torch.split(torch.cat([x, y], 1), [4, 2], 1)[1].sin() + x.sum(),
            (3, 4), (3, 2),
        ),
        Example(
            lambda x, y: torch.split(torch.cat([x, y], 1), [3, 3], 1)[1].sin(), (3, 4), (3, 2),
            reason="the parts are not known to have the sizes of what was put together",
        ),
    ],
    "remove_unbind_of_stack": [
        Example(lambda x, y: torch.stack([x, y], 1).unbind(1)[1].sin() + x, (3, 4), (3, 4)),
        Example(
            lambda x, y: torch.stack([x, y], 1).unbind(0)[1].sin(), (3, 4), (3, 4),
            reason="different",
        ),
    ],
    "remove_cat_of_split": [
        Example(lambda x: torch.cat(torch.split(x, [1, 3], 1), 1).sin(), (3, 4)),
        Example(lambda x: torch.stack(torch.unbind(x, 1), 1).sin(), (3, 4)),
        Example(
            lambda x: torch.cat(torch.split(x, [1, 3], 1)[::-1], 1).sin(), (3, 4),
            reason="it does not put all parts together in their order",
        ),
        Example(
            lambda x: torch.cat(torch.split(x, [2, 2], 1), 0).sin(), (3, 4),
            reason="it puts the parts together along another dimension",
        ),
    ],
}  # fmt: skip
