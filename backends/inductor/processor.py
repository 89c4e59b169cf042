"""What machine code needs of the processor it runs on: its kind, and its instruction sets.

Inductor compiles for the very processor that it runs on. Elsewhere such code would end the whole
process with an illegal instruction, so this is compared before any of it is loaded.
"""

from __future__ import annotations

import functools
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# flags of /proc/cpuinfo that name instructions; the others are about power, caches and bugs
_INSTRUCTIONS = re.compile(
    r"sse.*|ssse3|pni|avx.*|amx.*|fma|f16c|bmi\d|abm|popcnt|movbe|adx|aes|vaes|pclmulqdq|vpclmulqdq|"
    r"sha.*|gfni|rdrand|rdseed|rtm|hle|clwb|clflushopt|movdir.*|serialize|xsave.*|lahf_lm|cx16|mmx"
)


@functools.cache
def this_machine() -> dict[str, Any]:
    """Return the system, the architecture and the instruction sets of this machine."""
    return {
        "system": sys.platform,
        "architecture": platform.machine(),
        "instructions": sorted(_instructions()),
    }


def unfit(needed: Mapping[str, Any]) -> str | None:
    """Return why code for `needed` cannot run here, in words; None where it can."""
    here = this_machine()
    for key in ("system", "architecture"):
        if needed[key] != here[key]:
            return f"it was made for {needed[key]!s:.40}, and this is {here[key]}"
    absent = sorted(set(map(str, needed["instructions"])) - set(here["instructions"]))
    if absent:
        return f"this processor has no {', '.join(absent)[:200]}, which the code may use"
    return None


def _instructions() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: as much as PyTorch knows
        return {torch.backends.cpu.get_cpu_capability()}
    found = re.search(r"^(flags|Features)\s*:(.*)$", text, re.MULTILINE)
    if found is None:
        return {torch.backends.cpu.get_cpu_capability()}
    words = set(found.group(2).split())
    if found.group(1) == "Features":  # Arm names nothing else there
        return words
    return {word for word in words if _INSTRUCTIONS.fullmatch(word)}
