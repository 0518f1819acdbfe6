"""What the instructions of sm_90 compute, as far as nvcc uses them in the kernel that .ci/executed.py runs: for all lanes of a
warp, written where `on` says. Special functions give the exact value, rounded."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from machine import Warp

LANES = 32
COMPARE = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip
SILENT = {"NOP", "YIELD", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "DEPBAR"}


def bits_are(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def bits_of(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).view(np.uint32)


def halves(words: np.ndarray, code: list[str]) -> list[np.ndarray]:
    """The values of the two halves of words, bfloat16 where the code says so, else float16."""
    if "BF16_V2" in code:
        return [bits_are(words << np.uint32(16)), bits_are(words & np.uint32(0xFFFF0000))]
    both = words.astype(np.uint32).view(np.float16).astype(np.float32)
    return [both[0::2], both[1::2]]


def signed(words: np.ndarray) -> np.ndarray:
    return words.astype(np.uint32).view(np.int32).astype(np.int64)


def unknown(warp: Warp, code: list[str], args: list[str], on: np.ndarray) -> None:
    raise NotImplementedError(f"{'.'.join(code)} {', '.join(args)}")


def predicates_first(args: list[str]) -> tuple[list[str], list[str]]:
    """Results that are predicates, between the register and the sources."""
    found = 1
    while re.fullmatch(r"U?P(?:T|\d)", args[found]):
        found += 1
    return args[1:found], args[found:]


def iadd3(w: Warp, code, args, on):
    out, sources = predicates_first(args)
    carries = [one for one in sources if re.fullmatch(r"!?U?P(?:T|\d)", one)]
    total = np.zeros(LANES, dtype=np.int64)
    for one in sources:
        if one in carries:
            total += w.predicate(one)
        elif one.startswith("-"):  # with the carry of its two's complement
            total += (~w.value(one[1:])).astype(np.int64) + 1
        else:
            total += w.value(one).astype(np.int64)
    w.set(args[0], total & 0xFFFFFFFF, on)
    for i, one in enumerate(out):
        w.set_predicate(one, total >> 32 > i, on)


def imad(w: Warp, code, args, on):
    args = list(args)
    if "WIDE" in code:
        pick = (lambda x: w.value(x).astype(np.int64)) if "U32" in code else (lambda x: signed(w.value(x)))
        product = (pick(args[-3]) * pick(args[-2])).astype(np.uint64)
        w.set_pair(args[0], product + w.pair(args[-1]), on)
    elif "HI" in code:
        product = w.value(args[1]).astype(np.uint64) * w.value(args[2]).astype(np.uint64)
        low = product + w.pair(args[3])
        w.set(args[0], low >> np.uint64(32), on)
    else:
        total = w.value(args[1]).astype(np.uint64) * w.value(args[2]).astype(np.uint64) + w.value(args[3]).astype(np.uint64)
        if "X" in code:
            total = total + w.predicate(args[4]).astype(np.uint64)
        w.set(args[0], total & np.uint64(0xFFFFFFFF), on)


def lea(w: Warp, code, args, on):
    out, sources = predicates_first(args)
    shift = next(int(one, 16) for one in sources[2:] if one.startswith("0x")) if len(sources) > 2 else 0
    a, b = w.value(sources[0]).astype(np.uint64), w.value(sources[1]).astype(np.uint64)
    if "HI" in code:
        high = (
            (signed(w.value(sources[0])) >> 31).astype(np.uint64) if "SX32" in code else w.value(sources[2]).astype(np.uint64)
        )
        shift = int(sources[2 if "SX32" in code else 3], 16)
        a = ((high << np.uint64(32) | a) << np.uint64(shift)) >> np.uint64(32)
    else:
        shift = int(sources[2], 16)
        a = (a << np.uint64(shift)) & np.uint64(0xFFFFFFFF)
    total = (a & np.uint64(0xFFFFFFFF)) + b
    if "X" in code:
        total = total + w.predicate(sources[-1]).astype(np.uint64)
    w.set(args[0], total & np.uint64(0xFFFFFFFF), on)
    if out:
        w.set_predicate(out[0], total >> np.uint64(32) > 0, on)


def shf(w: Warp, code, args, on):
    low, high = w.value(args[1]).astype(object), w.value(args[3]).astype(object)
    shift = w.value(args[2]).astype(object)
    found = []
    for x, s, y in zip(low, shift, high, strict=True):
        x, s, y = int(x), int(s), int(y)
        if code[1] == "L":
            if code[-1] == "HI":
                found.append(((y << 32 | x) << min(s, 64)) >> 32 & 0xFFFFFFFF)
            else:
                found.append((x << min(s, 32)) & 0xFFFFFFFF)
        elif code[2] == "S32":
            y = y - (1 << 32) if y >> 31 else y
            found.append(y >> min(s, 32) & 0xFFFFFFFF)
        elif code[-1] == "HI":
            found.append(y >> min(s, 32))
        else:
            found.append((y << 32 | x) >> min(s, 64) & 0xFFFFFFFF)
    w.set(args[0], np.array(found, dtype=np.uint64), on)


def lop3(w: Warp, code, args, on):
    out = []
    if re.fullmatch(r"U?P(?:T|\d)", args[0]):
        out, args = [args[0]], args[1:]
    a, b, c, table = w.value(args[1]), w.value(args[2]), w.value(args[3]), int(args[4], 16)
    found = np.zeros(LANES, dtype=np.uint32)
    for i in range(8):
        if table >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    w.set(args[0], found, on)
    for one in out:
        w.set_predicate(one, (found != 0) | w.predicate(args[5]), on)


def plop3(w: Warp, code, args, on):
    a, b, c = (w.predicate(one) for one in args[2:5])
    for name, table in zip(args[:2], args[5:7], strict=True):
        found = np.zeros(LANES, dtype=bool)
        for i in range(8):
            if int(table, 16) >> i & 1:
                found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        w.set_predicate(name, found, on)


def combine(w: Warp, code, found, args, on):
    other = w.predicate(args[4])
    both = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[
        next(one for one in code if one in ("AND", "OR", "XOR"))
    ]
    w.set_predicate(args[0], both(found, other), on)
    w.set_predicate(args[1], both(~found, other), on)


def isetp(w: Warp, code, args, on):
    pick = w.value if "U32" in code else lambda text: signed(w.value(text))
    a, b = pick(args[2]), pick(args[3])
    found = COMPARE[code[1]](a, b)
    if "EX" in code:
        below = w.predicate(args[5])
        found = {"EQ": found & below, "NE": found | below}.get(code[1], (found & (a != b)) | ((a == b) & below))
    combine(w, code, found, args, on)


def fsetp(w: Warp, code, args, on):
    a, b = w.real(args[2]), w.real(args[3])
    neither = np.isnan(a) | np.isnan(b)
    if code[1] in ("NAN", "NUM"):
        found = neither if code[1] == "NAN" else ~neither
    elif code[1] in COMPARE:
        found = COMPARE[code[1]](a, b) & ~neither
    else:
        found = COMPARE[code[1].removesuffix("U")](a, b) | neither
    combine(w, code, found, args, on)


def extreme(values: list[np.ndarray], nan_wins: bool, least: np.ndarray) -> np.ndarray:
    total = values[0]
    for one in values[1:]:
        found = np.where(least, np.fmin(total, one), np.fmax(total, one))
        total = np.where(np.isnan(total) | np.isnan(one), np.float32(np.nan), found) if nan_wins else found
    return total


def fmnmx(w: Warp, code, args, on):
    found = extreme([w.real(one) for one in args[1:-1]], "NAN" in code, w.predicate(args[-1]))
    w.set(args[0], np.where(np.isnan(found), np.uint32(0x7FFFFFFF), bits_of(found)), on)


def hmnmx(w: Warp, code, args, on):
    if "NAN" not in code:
        unknown(w, code, args, on)
    bits = []
    for values in zip(*[halves(w.value(one), code) for one in args[1:-1]], strict=True):
        found = extreme(list(values), True, w.predicate(args[-1]))
        if "BF16_V2" in code:
            half = bits_of(found) >> np.uint32(16)
        else:
            half = found.astype(np.float16).view(np.uint16).astype(np.uint32)
        bits.append(np.where(np.isnan(found), np.uint32(0x7FFF), half))
    w.set(args[0], bits[0] | bits[1] << np.uint32(16), on)


def hset2(w: Warp, code, args, on):
    if code[-2:] != ["GEU", "AND"] or args[3] != "PT":
        unknown(w, code, args, on)
    found = [~(a < b) for a, b in zip(halves(w.value(args[1]), code), halves(w.value(args[2]), code), strict=True)]
    w.set(args[0], found[0] * np.uint32(0xFFFF) | found[1] * np.uint32(0xFFFF0000), on)


def hadd2(w: Warp, code, args, on):
    """The float32 of one half."""
    if code != ["HADD2", "F32"] or args[1] != "-RZ":
        unknown(w, code, args, on)
    name, half = args[2].split(".")
    w.set(args[0], bits_of(halves(w.value(name), code)[half == "H1_H1"]), on)


def vimnmx(w: Warp, code, args, on):
    pick = w.value if "U32" in code else lambda text: signed(w.value(text))
    total, rest = pick(args[1]), args[2:-1]
    if code[0] == "VIADDMNMX":
        total, rest = (total + pick(rest[0])).astype(total.dtype), rest[1:]
    for one in rest:
        total = np.where(w.predicate(args[-1]), np.minimum(total, pick(one)), np.maximum(total, pick(one)))
    w.set(args[0], total, on)


def prmt(w: Warp, code, args, on):
    a, choice, b = (w.value(one).astype(np.uint64) for one in args[1:4])
    both, found = a | b << np.uint64(32), np.zeros(LANES, dtype=np.uint64)
    for i in range(4):
        nibble = choice >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), np.where(byte >> np.uint64(7), 255, 0).astype(np.uint64), byte)
        found |= byte << np.uint64(8 * i)
    w.set(args[0], found, on)


def counted(of: Callable[[int], int]):
    def do(w: Warp, code, args, on):
        w.set(args[0], np.array([of(int(x)) & 0xFFFFFFFF for x in w.value(args[-1])], dtype=np.uint64), on)

    return do


def flo(w: Warp, code, args, on):
    def top(x: int) -> int:
        return -1 if x == 0 else 32 - x.bit_length() if "SH" in code else x.bit_length() - 1

    counted(top)(w, code, args, on)


def convert(w: Warp, code, args, on):
    if code == ["I2F", "U32", "RP"]:
        value = w.value(args[1]).astype(np.float64)
        found = value.astype(np.float32)
        w.set(args[0], bits_of(np.where(found < value, np.nextafter(found, np.float32(np.inf)), found)), on)
    elif code == ["I2FP", "F32", "S32"]:
        w.set(args[0], bits_of(signed(w.value(args[1])).astype(np.float32)), on)
    elif code == ["F2FP", "F16", "F32", "PACK_AB"]:
        with np.errstate(over="ignore"):
            high, low = (w.real(one).astype(np.float16).view(np.uint16).astype(np.uint32) for one in args[1:3])
        w.set(args[0], low | high << np.uint32(16), on)
    elif code[0] == "F2I" and "U32" in code and "TRUNC" in code:
        w.set(
            args[0], np.clip(np.nan_to_num(np.trunc(w.real(args[1]).astype(np.float64))), 0, 2**32 - 1).astype(np.uint64), on
        )
    else:
        unknown(w, code, args, on)


def mufu(w: Warp, code, args, on):
    value = w.real(args[1]).astype(np.float64)
    with np.errstate(all="ignore"):
        w.set(args[0], bits_of({"RCP": lambda: 1 / value, "EX2": lambda: np.exp2(value)}[code[1]]()), on)


def arithmetic(of):
    def do(w: Warp, code, args, on):
        with np.errstate(all="ignore"):
            w.set(args[0], bits_of(of(*[w.real(one).astype(np.float64) for one in args[1:]]).astype(np.float32)), on)

    return do


def move(w: Warp, code, args, on):
    if "64" in code or code[0] == "CS2R":
        w.set_pair(args[0], w.pair(args[1]) if args[1] != "SRZ" else np.zeros(LANES, dtype=np.uint64), on)
    else:
        w.set(args[0], w.value(args[1]), on)


def special(w: Warp, code, args, on):
    values = {
        "SR_TID.X": w.tid,
        "SR_CTAID.X": w.block.index,
        "SR_CgaCtaId": 0,
        "SR_LANEID": w.tid % LANES,
        "SR_SWINHI": w.block.window,
        "SR_LTMASK": (np.uint32(1) << w.tid % np.uint32(LANES)) - np.uint32(1),
    }
    w.set(args[0], np.broadcast_to(np.asarray(values[args[1]], dtype=np.uint32), LANES), on)


def p2r(w: Warp, code, args, on):
    mask = int(args[3], 16)
    found = sum(w.p[i].astype(np.uint32) << np.uint32(i) for i in range(7))
    w.set(args[0], (w.value(args[2]) & np.uint32(~mask & 0xFFFFFFFF)) | found & np.uint32(mask), on)


def shuffle(w: Warp, code, args, on):
    inside, target, source = args[0], args[1], w.value(args[2]).copy()
    lane, distance = np.arange(LANES), w.value(args[3]).astype(np.int64)
    end = w.value(args[4]).astype(np.int64) & 31
    there = {"DOWN": lane + distance, "UP": lane - distance, "IDX": distance, "BFLY": lane ^ distance}[code[1]]
    good = there >= end if code[1] == "UP" else there <= end
    w.set(target, source[np.where(good, there, lane)], on)
    w.set_predicate(inside, good, on)


def redux(w: Warp, code, args, on):
    values = w.value(args[1])[on].astype(np.uint64)
    found = {"SUM": np.sum, "MIN": np.min, "MAX": np.max}[code[1] if len(code) > 1 else "SUM"](values)
    w.set(args[0], np.full(LANES, int(found) & 0xFFFFFFFF, dtype=np.uint64), on)


def vote(w: Warp, code, args, on):
    mask = sum(1 << int(i) for i in np.flatnonzero(on & w.predicate(args[2])))
    w.set(args[0], np.full(LANES, mask, dtype=np.uint64), on)
    w.set_predicate(args[1], np.full(LANES, mask != 0), on)


def width(code: list[str]) -> tuple[int, bool]:
    for one, size in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2), ("64", 8), ("128", 16)):
        if one in code:
            return size, one.startswith("S")
    return 4, False


def load(w: Warp, code, args, on):
    size, sign = width(code)
    where = w.address(args[1])
    for lane in np.flatnonzero(on):
        data = w.block.cells(code[0], int(where[lane]), size)
        words = np.frombuffer(data.tobytes().ljust(4, b"\0"), dtype=np.uint32)
        for i, word in enumerate(words):
            w.r[int(args[0][1:]) + i][lane] = word
        if sign:
            raise NotImplementedError(".".join(code))


def store(w: Warp, code, args, on):
    size, _ = width(code)
    where, zero = w.address(args[0]), args[1] == "RZ"
    for lane in np.flatnonzero(on):
        first = 0 if zero else int(args[1][1:])
        words = [0 if zero else int(w.r[first + i][lane]) for i in range(max(1, size // 4))]
        w.block.cells(code[0], int(where[lane]), size)[:] = np.array(words, dtype=np.uint32).view(np.uint8)[:size]


def atomic(w: Warp, code, args, on):
    target, place, operand = [one for one in args if one != "PT"]
    where, values = w.address(place), w.value(operand)
    before = w.value(target).copy() if target != "RZ" else np.zeros(LANES, dtype=np.uint32)
    for lane in np.flatnonzero(on):
        cell = w.block.cells(code[0], int(where[lane]), 4).view(np.uint32)
        before[lane] = cell[0]
        if "INC" in code:
            cell[0] = 0 if cell[0] >= values[lane] else cell[0] + 1
        elif "ADD" in code:
            cell[0] = (int(cell[0]) + int(values[lane])) & 0xFFFFFFFF
        else:
            unknown(w, code, args, on)
    w.set(target, before, on)


def select(w: Warp, code, args, on):
    if code[0] == "FSEL":
        w.set(args[0], bits_of(np.where(w.predicate(args[3]), w.real(args[1]), w.real(args[2]))), on)
    else:
        w.set(args[0], np.where(w.predicate(args[3]), w.value(args[1]), w.value(args[2])), on)


OPERATIONS = {
    **dict.fromkeys(["IADD3", "UIADD3", "VIADD", "UIADD"], iadd3), "IMAD": imad, "UIMAD": imad, "LEA": lea, "ULEA": lea,
    **dict.fromkeys(["SHF", "USHF"], shf), **dict.fromkeys(["LOP3", "ULOP3"], lop3), "PLOP3": plop3, "ISETP": isetp,
    "UISETP": isetp, "FSETP": fsetp, "FMNMX": fmnmx, "HMNMX2": hmnmx, "VHMNMX": hmnmx, "HSET2": hset2, "HADD2": hadd2,
    **dict.fromkeys(["VIMNMX", "VIMNMX3", "VIADDMNMX"], vimnmx), "PRMT": prmt, "UPRMT": prmt, "POPC": counted(int.bit_count),
    "UPOPC": counted(int.bit_count), "BREV": counted(lambda x: int(f"{x:032b}"[::-1], 2)), "FLO": flo, "UFLO": flo,
    **dict.fromkeys(["I2F", "I2FP", "F2I", "F2FP"], convert), "MUFU": mufu, "FADD": arithmetic(lambda a, b: a + b),
    "FMUL": arithmetic(lambda a, b: a * b), "FFMA": arithmetic(lambda a, b, c: a * b + c),
    **dict.fromkeys(["MOV", "UMOV", "LDC", "ULDC", "CS2R", "R2UR"], move), "S2R": special, "S2UR": special, "P2R": p2r,
    "SHFL": shuffle, "REDUX": redux, "VOTE": vote, "VOTEU": vote, **dict.fromkeys(["LDG", "LD", "LDS"], load),
    **dict.fromkeys(["STG", "ST", "STS"], store), **dict.fromkeys(["ATOMS", "ATOM", "ATOMG", "RED"], atomic),
    "SEL": select, "USEL": select, "FSEL": select,
}  # fmt: skip
