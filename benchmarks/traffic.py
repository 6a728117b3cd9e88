"""Computes the memory traffic of a compiled program from its text."""

import math
import re
from typing import NamedTuple

WIDTHS = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, |$)(.*)")
COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
COPIES = {"copy", "transpose"}


class Instruction(NamedTuple):
    """A line of a compiled program."""

    name: str
    result: str
    operation: str
    arguments: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of all computations by name, and the entry's name."""
    found: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif match := INSTRUCTION.match(line):
            found[name].append(Instruction(*match.groups()))
    return found, entry


def arrays(result: str) -> list[tuple[int, bool]]:
    """The bytes of each array of a result, and whether the array is in the main memory.

    Arrays in the other memories of a TPU (vector and scalar) have `S(1)` or higher in their layout.
    """
    return [
        (
            WIDTHS.get(kind, 1) * math.prod(int(n) for n in shape.split(",") if n),
            "S(" not in layout,
        )
        for kind, shape, layout in ARRAY.findall(result)
    ]


def in_main_memory(result: str) -> int:
    return sum(size for size, main in arrays(result) if main)


def uses(computation: list[Instruction]) -> list[int]:
    """How often a fusion reads each parameter: once, or once per concatenated part that uses it."""
    by_name = {each.name: each for each in computation}
    joins = next((each for each in computation if each.operation == "concatenate"), None)
    parameters = [each for each in computation if each.operation == "parameter"]
    parameters.sort(key=lambda each: int(each.arguments))
    counts = dict.fromkeys((each.name for each in parameters), 0)

    def reached(name: str, seen: set[str]) -> set[str]:
        if name not in seen:
            seen.add(name)
            for operand in by_name[name].operands:
                reached(operand, seen)
        return seen

    for part in joins.operands if joins else ():
        for name in reached(part, set()) & counts.keys():
            counts[name] += 1
    return [max(count, 1) for count in counts.values()]


def traffic(text: str) -> tuple[int, int, int]:
    """The bytes that the entry computation's kernels read and write, and counts of kernels, copies.

    Copies count if they are larger than 64 KiB.
    """
    program, entry = computations(text)
    results = {each.name: each.result for each in program[entry]}
    total = kernels = copies = 0
    for each in program[entry]:
        if each.operation in FREE or each.operation.endswith("-done"):
            continue
        found = arrays(each.result)
        largest = max((size for size, _ in found), default=0)
        if each.operation in ("copy-start", "slice-start"):  # result: target, source and a flag
            ends = found[:2]
            total += min(size for size, _ in ends) * sum(main for _, main in ends)
            continue
        if "ConcatBitcast" in each.rest:  # on a TPU: adjacent slices, which need no copy
            continue
        called = re.search(r"calls=%(\S+?)(?:,|$)", each.rest)
        times = [1] * len(each.operands)
        if called and each.operation == "fusion":
            times = uses(program[called[1]])
        for name, count in zip(each.operands, times, strict=True):
            total += count * in_main_memory(results[name])
        total += in_main_memory(each.result)
        # A TPU computes scalars outside its kernels.
        kernels += each.operation == "fusion" or largest > 8
        copies += each.operation in COPIES and largest > 1 << 16
    return total, kernels, copies
