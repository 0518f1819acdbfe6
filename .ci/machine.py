"""Executes what nvcc made of a CUDA kernel for sm_90, on the host: the machine code that nvdisasm prints, an instruction of a
warp at a time, warps and blocks one after the other. It has no clock and no caches, and says nothing of speed. An error is an
access beyond a tensor or from an address that its width does not allow, and an instruction that it does not know."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import numpy as np
from operations import LANES, OPERATIONS, SILENT, bits_are, unknown

WINDOW = 1  # upper word of the addresses of shared memory among all addresses
SHARED = 0x400  # where the shared memory of a kernel begins
PARAMETERS = 0x210  # and its parameters, in constant bank 0
BLOCK, WARP, READY = -3, -2, -1  # what a lane waits for: else the number of a barrier of lanes
SECTION = re.compile(r"^\.text\.(\S+):$")
FRAME = re.compile(r'//## File "([^"]+)", line (\d+)')
LABEL = re.compile(r"^(\.L_x_\w+|\$\S+):")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+) )?(\S+)\s*(.*?) ;")


class Instruction(NamedTuple):
    guard: str | None
    code: list[str]  # the opcode and what it is modified by
    operands: list[str]
    frames: tuple[tuple[str, int], ...]  # file and line, of the innermost function first


class Code(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]
    at: dict[int, int]  # of an address


def read(text: str, kernel: str) -> Code:
    """The code of the first kernel whose name matches, with what `nvdisasm -c -gi` says of it."""
    code, frames, fresh, inside = Code([], {}, {}), [], False, False
    for line in text.splitlines():
        if match := SECTION.match(line):
            inside = not code.instructions and re.search(kernel, match[1]) is not None
        elif not inside:
            continue
        elif match := LABEL.match(line):
            code.labels[match[1]] = len(code.instructions)
        elif match := FRAME.search(line):
            frames = [*(frames if fresh else []), (match[1], int(match[2]))]
            fresh = True
        elif match := INSTRUCTION.match(line):
            fresh = False
            operands = [one.replace(".reuse", "") for one in match[4].split(", ")] if match[4] else []
            code.at[int(match[1], 16)] = len(code.instructions)
            code.instructions.append(
                Instruction(match[2], match[3].split("."), [one.strip() for one in operands], tuple(frames))
            )
    return code


class Memory:
    """Pieces of memory at addresses of their own: a read or write elsewhere is an error."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, np.ndarray]] = []

    def add(self, array: np.ndarray) -> int:
        at = 0x7000_0000_0000 + (len(self.pieces) << 32) + 0x100
        self.pieces.append((at, array.reshape(-1).view(np.uint8)))
        return at

    def find(self, address: int, size: int) -> np.ndarray:
        for start, piece in self.pieces:
            if start <= address and address + size <= start + len(piece):
                if address % size:
                    raise RuntimeError(f"misaligned access of {size} bytes")
                return piece[address - start : address - start + size]
        raise RuntimeError(f"access of {size} bytes at {address:#x}, where nothing is")


class Warp:
    def __init__(self, block: Block, first: int) -> None:
        self.block, self.code = block, block.code
        self.r = np.zeros((256, LANES), dtype=np.uint32)
        self.p = np.zeros((8, LANES), dtype=bool)
        self.p[7] = True
        self.u = np.zeros(64, dtype=np.uint32)
        self.up = np.zeros(8, dtype=bool)
        self.up[7] = True
        self.tid = np.arange(first, first + LANES, dtype=np.uint32)
        self.pc = np.zeros(LANES, dtype=np.int64)
        self.alive = np.ones(LANES, dtype=bool)
        self.waits = np.full(LANES, READY)
        self.last = 0
        self.barriers: dict[str, np.ndarray] = {}

    # Operands. What is one for the whole warp is so for all lanes.

    def value(self, text: str) -> np.ndarray:
        text = text.removesuffix(".64")
        if text.startswith("-"):
            return (~self.value(text[1:]) + np.uint32(1)).astype(np.uint32)
        if text.startswith("~"):
            return ~self.value(text[1:])
        if text in ("RZ", "URZ", "SRZ"):
            return np.zeros(LANES, dtype=np.uint32)
        if re.fullmatch(r"R\d+", text):
            return self.r[int(text[1:])]
        if re.fullmatch(r"UR\d+", text):
            return np.full(LANES, self.u[int(text[2:])])
        if match := re.fullmatch(r"c\[0x0\]\[(0x\w+)\]", text):
            return np.full(LANES, self.constant(int(match[1], 16)))
        if re.fullmatch(r"0x[0-9a-f]+", text):
            return np.full(LANES, int(text, 16), dtype=np.uint32)
        raise NotImplementedError(f"operand {text}")

    def constant(self, at: int) -> np.uint32:
        given = self.block.parameters
        return given[at - PARAMETERS : at - PARAMETERS + 4].view(np.uint32)[0] if at >= PARAMETERS else np.uint32(0)

    def real(self, text: str) -> np.ndarray:
        if text.startswith("|"):
            return np.abs(self.real(text.strip("|")))
        if re.match(r"-?\|", text):
            return -np.abs(self.real(text[1:].strip("|")))
        if re.match(r"-(?:U?R|c)", text):
            return -self.real(text[1:])
        if re.match(r"[RUc]", text):
            return bits_are(self.value(text))
        number = text.replace("+", "").replace("INF", "inf").replace("QNAN", "nan").strip()
        return np.full(LANES, float(number), dtype=np.float32)

    def pair(self, text: str) -> np.ndarray:
        """64 bits of two registers."""
        text = text.removesuffix(".64")
        if text in ("RZ", "URZ"):
            return np.zeros(LANES, dtype=np.uint64)
        if match := re.fullmatch(r"c\[0x0\]\[(0x\w+)\]", text):
            low = int(match[1], 16)
            words = self.constant(low), self.constant(low + 4)
            return np.full(LANES, int(words[0]) | int(words[1]) << 32, dtype=np.uint64)
        name, number = re.fullmatch(r"(U?R)(\d+)", text).groups()
        low, high = self.value(f"{name}{number}"), self.value(f"{name}{int(number) + 1}")
        return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    def predicate(self, text: str) -> np.ndarray:
        if text.startswith("!"):
            return ~self.predicate(text[1:])
        if text.startswith("UP"):
            return np.full(LANES, text == "UPT" or self.up[int(text[2:])])
        return self.p[7 if text == "PT" else int(text[1:])]

    def set(self, name: str, value: np.ndarray, on: np.ndarray) -> None:
        value = np.asarray(value).astype(np.uint64).astype(np.uint32)
        if name.startswith("UR"):
            if name != "URZ":
                self.u[int(name[2:])] = value if value.ndim == 0 else value[on][0]
        elif name != "RZ":
            self.r[int(name[1:])][on] = np.broadcast_to(value, LANES)[on]

    def set_pair(self, name: str, value: np.ndarray, on: np.ndarray) -> None:
        if name in ("RZ", "URZ"):
            return
        kind, number = re.fullmatch(r"(U?R)(\d+)", name).groups()
        self.set(name, value & np.uint64(0xFFFFFFFF), on)
        self.set(f"{kind}{int(number) + 1}", value >> np.uint64(32), on)

    def set_predicate(self, name: str, value: np.ndarray, on: np.ndarray) -> None:
        if name.startswith("UP"):
            if name != "UPT":
                self.up[int(name[2:])] = value[on][0]
        elif name != "PT":
            self.p[int(name[1:])][on] = value[on]

    def address(self, text: str) -> np.ndarray:
        match = re.fullmatch(r"(?:desc\[UR\d+\])?\[([^\]]*)\]", text)
        total = np.zeros(LANES, dtype=np.uint64)
        for part in match[1].replace("+-", "-").replace("-", "+-").split("+"):
            if part.endswith(".64"):
                total = total + self.pair(part)
            elif part.startswith("-"):
                total = total - self.value(part[1:]).astype(np.uint64)
            elif part:
                total = total + self.value(part.removesuffix(".U32").removesuffix(".X4")).astype(np.uint64)
        return total if "desc" in text else total & np.uint64(0xFFFFFFFF)

    # What comes next.

    def run(self) -> None:
        """Up to a barrier of the block, or the end. Lanes that part go on one group after the other."""
        while True:
            ready = self.alive & (self.waits == READY)
            if not ready.any():
                if not (self.waits[self.alive] == BLOCK).all():
                    raise RuntimeError("lanes of a warp wait for each other")
                return
            group = ready & (self.pc == self.last)
            if not group.any():
                group = ready & (self.pc == self.pc[ready][0])
            self.last = self.step(int(self.pc[group][0]), group)

    def step(self, at: int, group: np.ndarray) -> int:
        """Executes an instruction for the lanes of a group; where they go on."""
        one = self.code.instructions[at]
        on = group & self.predicate(one.guard) if one.guard else group
        self.block.executed[at] += one.code[0] != "NOP"
        self.pc[group] = at + 1
        if on.any():
            self.execute(one, on)
        went = self.pc[group & self.alive]
        return int(went[0]) if len(went) else -1

    def jump(self, label: str, on: np.ndarray) -> None:
        self.pc[on] = self.code.labels[re.fullmatch(r"`\((.*)\)", label)[1]]

    def meet(self, name: str) -> None:
        """Lets those go that wait for a barrier at which all have arrived."""
        mask = self.barriers[name] & self.alive
        number = int(name[1:])
        if (self.waits[mask] == number).all():
            self.waits[mask] = READY

    def execute(self, one: Instruction, on: np.ndarray) -> None:
        name, code, args = one.code[0], one.code, one.operands
        if name in SILENT:
            return
        if name == "EXIT":
            self.alive &= ~on
            for barrier in self.barriers:
                self.meet(barrier)
        elif name == "BRA":
            if "DIV" in code:
                if int(self.value(args[0])[0]) != sum(1 << i for i in np.flatnonzero(on)):
                    self.jump(args[-1], on)
                return
            for extra in args[:-1]:
                on = on & self.predicate(extra)
            self.jump(args[-1], on)
        elif name == "BSSY":
            self.barriers[args[0]] = on.copy()
        elif name == "BREAK":
            self.barriers[args[-1]] &= ~on
            self.meet(args[-1])
        elif name == "BSYNC":
            self.waits[on] = int(args[0][1:])
            self.meet(args[0])
        elif name == "WARPSYNC":
            if code != ["WARPSYNC", "ALL"]:
                unknown(self, code, args, on)
            self.waits[on] = WARP
            if (self.waits[self.alive] == WARP).all():
                self.waits[:] = READY
        elif name == "BAR":
            self.waits[on] = BLOCK
        elif name == "CALL":
            self.jump(args[0], on)
        elif name == "RET":
            self.pc[on] = [self.code.at[int(address)] for address in self.value(args[0].split()[0])[on]]
        else:
            OPERATIONS.get(name, unknown)(self, code, args, on)


class Block:
    window = WINDOW

    def __init__(self, code: Code, memory: Memory, parameters: np.ndarray, index: int, executed: Counter[int]) -> None:
        self.code, self.memory, self.parameters, self.index, self.executed = code, memory, parameters, index, executed
        self.shared = Memory()
        self.shared.pieces.append((SHARED, np.full(48 * 1024, 0xFF, dtype=np.uint8)))

    def run(self, threads: int) -> None:
        warps = [Warp(self, first) for first in range(0, threads, LANES)]
        while any(warp.alive.any() for warp in warps):
            for warp in warps:
                warp.run()
            for warp in warps:
                warp.waits[:] = READY

    def cells(self, space: str, address: int, size: int) -> np.ndarray:
        """Bytes of the memory that an opcode is for."""
        if space in ("LDS", "STS", "ATOMS"):
            return self.shared.find(address, size)
        if space in ("LD", "ST", "ATOM") and address >> 32 == WINDOW:
            return self.shared.find(address & 0xFFFFFFFF, size)
        return self.memory.find(address, size)


def launch(code: Code, memory: Memory, parameters: bytes, blocks: int, threads: int) -> Counter[int]:
    """Runs a kernel. How often a warp executed each instruction, by its place in the code."""
    executed: Counter[int] = Counter()
    given = np.frombuffer(parameters.ljust(4096, b"\0"), dtype=np.uint8)
    for index in range(blocks):
        Block(code, memory, given, index, executed).run(threads)
    return executed
