"""Reading machine code (SASS or AMD's): the way of one thread through a full block, what it executes and what it moves."""

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

# A slow path (of a division or a root, for subnormal numbers) is a call: taken only where no other way leads on.
SLOW = 10_000
_START, _END = "start", "end"
_NVIDIA_BYTES = {".256": 32, ".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1, "": 4}
_AMD_BYTES = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


class Access(NamedTuple):
    """One thread's access to global memory."""

    kind: str
    """"load" or "store"."""
    size: int
    """Bytes."""
    predicated: bool = False


class FullBlock(NamedTuple):
    """What one thread executes and moves for its part of a full block; loads of tables and scalars are left out."""

    instructions: int
    loads: tuple[int, ...]
    """Bytes of every load."""
    stores: tuple[int, ...]


@dataclass
class Block:
    """A basic block: instructions that are executed together."""

    instructions: int = 0
    calls: int = 0
    accesses: list[Access] = field(default_factory=list)
    next: list[str] = field(default_factory=list)
    """The blocks that may follow, by label."""

    @property
    def stores(self) -> tuple[int, ...]:
        """Bytes of every store."""
        return tuple(access.size for access in self.accesses if access.kind == "store")


class _Line(NamedTuple):
    """An instruction, or a label."""

    label: str = ""
    jump: str = ""
    """The label that it may jump to."""
    goes_on: bool = True
    """Whether the next line may follow."""
    access: Access | None = None
    call: bool = False


def full_block(text: str, amd: bool) -> FullBlock:
    """Follow the shortest way through the path that stores without a mask, which has the widest stores.

    Raises ValueError for code that it does not understand.
    """
    blocks = _blocks(_amd(text) if amd else _nvidia(text))
    wide = max(blocks, key=lambda name: (max(blocks[name].stores, default=0), sum(blocks[name].stores)))
    if not blocks[wide].stores:
        raise ValueError("there are no stores to global memory in this machine code: its format is unknown")
    way = [*_shortest(blocks, _START, wide), *_shortest(blocks, wide, _END)[1:]]
    fork = _fork(blocks, way)
    # a short full block is not branched to: its instructions bear a predicate
    data = [a for i, name in enumerate(way) for a in blocks[name].accesses if i >= fork or a.predicated]
    loads, stores = (tuple(access.size for access in data if access.kind == kind) for kind in ("load", "store"))
    return FullBlock(sum(blocks[name].instructions for name in way), loads, stores)


def _fork(blocks: dict[str, Block], way: list[str]) -> int:
    """From where on no other store can be reached: tables and scalars, which all threads load, lie before."""
    on = set(way)
    return next(i for i, name in enumerate(way) if not any(blocks[other].stores for other in _reachable(blocks, name) - on))


def _reachable(blocks: dict[str, Block], start: str) -> set[str]:
    found, rest = {start}, [start]
    while rest:
        new = set(blocks[rest.pop()].next) - found
        found |= new
        rest += new
    return found


def _shortest(blocks: dict[str, Block], start: str, end: str) -> list[str]:
    """Dijkstra's way with the fewest instructions, both ends included."""
    queue, done = [(0, start, [start])], set()
    while queue:
        length, name, way = heapq.heappop(queue)
        if name == end:
            return way
        if name not in done:
            done.add(name)
            cost = length + blocks[name].instructions + SLOW * blocks[name].calls
            for following in blocks[name].next:
                heapq.heappush(queue, (cost, following, [*way, following]))
    raise ValueError("there is no way through this machine code: its format is unknown")


def _blocks(lines: Iterator[_Line]) -> dict[str, Block]:
    """Basic blocks by label, from _START to the empty _END."""
    blocks, name = {_START: Block(), _END: Block()}, _START
    for number, line in enumerate(lines):
        block = blocks[name]
        if not line.label:
            block.instructions += 1
            block.calls += line.call
            if line.access:
                block.accesses.append(line.access)
            if line.goes_on and not line.jump:
                continue
        name = line.label or f"after {number}"
        block.next += [line.jump] * bool(line.jump) + [name] * line.goes_on
        blocks[name] = Block()
    return blocks


def _nvidia(text: str) -> Iterator[_Line]:
    """nvdisasm's lines, as in `/*0010*/ @P0 BRA .L_x_0`."""
    meets: dict[str, str] = {}  # barrier register to the label where threads that parted meet again
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            yield _Line(label[1])
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P\w+ +)?([A-Z]\w*)([\w.]*)\s*(.*)", line)
        if not found:
            continue
        predicate, opcode, tail, operands = found.groups()
        target = re.search(r"`\((\.L_x_\d+)\)", operands)
        conditional = bool(predicate) or bool(re.match(r"!?U?P\d", operands))
        if opcode in ("BRX", "BRXU", "JMX", "JMP"):
            raise ValueError(f"computed jumps are not understood. Received: {line.strip()}")
        if opcode == "BSSY" and target:
            meets[operands.split(",")[0]] = target[1]
        if opcode == "BSYNC":
            yield _Line(jump=meets[operands.split(" ")[0]], goes_on=conditional)
        elif opcode in ("BRA", "EXIT", "RET"):
            yield _Line(jump=target[1] if target and opcode == "BRA" else _END, goes_on=conditional)
        else:
            yield _Line(access=_nvidia_access(opcode, tail, conditional), call=opcode == "CALL")


def _nvidia_access(opcode: str, tail: str, predicated: bool) -> Access | None:
    if opcode not in ("LDG", "STG"):
        return None
    width = re.search(r"\.(?:256|128|64|[US](?:16|8))\b", tail)
    return Access({"LDG": "load", "STG": "store"}[opcode], _NVIDIA_BYTES[width[0] if width else ""], predicated)


def _amd(text: str) -> Iterator[_Line]:
    """LLVM's AMD assembly; masks are in a register of their own, no instruction bears a predicate."""
    for line in text.partition(".Lfunc_end")[0].splitlines():  # data and constants follow
        if label := re.match(r"(\.L\w+):", line):
            yield _Line(label[1])
        found = re.match(r"\s+([a-z]\w+)\s*([^;]*)", line)
        if not found:
            continue
        opcode, operands = found[1], found[2].strip()
        if opcode in ("s_setpc_b64", "s_swappc_b64"):
            raise ValueError(f"computed jumps are not understood. Received: {line.strip()}")
        if opcode.startswith(("s_branch", "s_cbranch", "s_endpgm")):
            yield _Line(jump=operands or _END, goes_on=opcode.startswith("s_cbranch"))
        else:
            access = re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", opcode)
            yield _Line(access=Access(access[1], _AMD_BYTES[access[2]]) if access else None)
