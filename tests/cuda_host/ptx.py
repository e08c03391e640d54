"""Translates nvcc's PTX to C++ that runs on the host runtime: a function a kernel, a variable a register, a statement
an instruction. An instruction, modifier or operand that is not known here ends the translation: nothing is guessed.

    python ptx.py kernels.ptx > kernels.cpp
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

C_TYPES = {"pred": "bool", "f32": "float", "f64": "double"}
C_TYPES |= {
    f"{kind}{bits}": f"std::{'' if kind == 's' else 'u'}int{bits}_t" for kind in "sub" for bits in (8, 16, 32, 64)
}
SPECIAL = {
    f"%{name}.{axis}": f"{variable}.{axis}"
    for name, variable in {"tid": "threadIdx", "ctaid": "blockIdx", "ntid": "blockDim", "nctaid": "gridDim"}.items()
    for axis in "xyz"
}
SPECIAL |= {"%laneid": "cuda_host::current->lane", "WARP_SZ": "32"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Comparisons that hold where either operand is NaN are the negation of their opposite.
COMPARE_OR_NAN = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
ORDERS = {"relaxed": "__ATOMIC_RELAXED", "acquire": "__ATOMIC_ACQUIRE", "release": "__ATOMIC_RELEASE",
          "acq_rel": "__ATOMIC_ACQ_REL", "volatile": "__ATOMIC_RELAXED"}  # fmt: skip
SCOPES = {"gpu", "sys"}  # of an order. A block's is not among them: it is no different here, and so would not be tested


class Unknown(Exception):
    """What the translator has no meaning for."""


def size(type: str) -> int:
    """Bytes of a PTX type."""
    return int(type[1:]) // 8


def split(text: str) -> list[str]:
    """Operands, at the commas outside of brackets and braces."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()] if part.strip() else parts


@dataclass
class Instruction:
    """One statement: `@predicate name.modifiers.type operands;`"""

    text: str
    line: int
    name: str
    modifiers: list[str]
    operands: list[str]

    @property
    def type(self) -> str:
        return self.modifiers[-1] if self.modifiers else ""

    def only(self, *known: str) -> None:
        """Stops on a modifier, in front of the type, that is not one of these."""
        if strange := [m for m in self.modifiers[:-1] if m not in known]:
            raise Unknown(f"modifier .{strange[0]}")


@dataclass
class Kernel:
    """The translation of one kernel's body."""

    name: str
    files: dict[str, str]
    parameters: dict[str, int]  # offset of each
    shared: dict[str, int]  # offset of each array; the dynamic one lies behind the static ones
    static_shared: int = 0
    local: str = ""
    local_bytes: int = 0
    scopes: list[dict[str, tuple[str, str]]] = field(default_factory=lambda: [{}])  # register: (variable, type)
    declarations: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    targets: dict[str, list[str]] = field(default_factory=dict)
    file: str = "?"
    source_line: int = 0

    # --- Registers and operands

    def declare(self, type: str, names: list[str]) -> None:
        for name in names:
            if ranged := re.fullmatch(r"(%?\w+)<(\d+)>", name):
                self.declare(type, [f"{ranged[1]}{i}" for i in range(int(ranged[2]))])
                continue
            variable = f"r{len(self.declarations)}_" + re.sub(r"\W", "", name)
            self.scopes[-1][name] = (variable, type)
            self.declarations.append(f"{C_TYPES[type]} {variable}{{}};")

    def register(self, name: str) -> tuple[str, str] | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def read(self, operand: str, type: str) -> str:
        """An operand's value as this PTX type."""
        c = C_TYPES[type]
        if type == "pred" and operand.startswith("!"):
            return f"!{self.read(operand[1:], type)}"
        if found := self.register(operand):
            return f"as<{c}>({found[0]})"
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return f"as<{c}>(std::uint32_t(0x{operand[2:]}u))"
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
            return f"as<{c}>(std::uint64_t(0x{operand[2:]}ull))"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            digits = operand.rstrip("U")
            return f"{c}({digits}{'ull' if not digits.startswith('-') else 'll'})"
        if operand in self.shared:
            return f"{c}({self.shared[operand]})"
        if operand == self.local:
            return f"{c}(local.base)"
        if operand in SPECIAL:
            return f"{c}({SPECIAL[operand]})"
        if operand in self.parameters:
            return f"{c}(reinterpret_cast<std::uint64_t>(parameters) + {self.parameters[operand]})"
        raise Unknown(f"operand {operand}")

    def write(self, operand: str, value: str) -> str:
        if operand == "_":
            return f"{value};"
        found = self.register(operand)
        if not found:
            raise Unknown(f"destination {operand}")
        return f"put({found[0]}, {value});"

    def place(self, i: Instruction) -> str:
        return f"Place{{{self.file}, {self.source_line}, {i.line}}}"

    def address(self, operand: str) -> str:
        match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not match:
            raise Unknown(f"address {operand}")
        return f"({self.read(match[1], 'u64')} + std::uint64_t({match[2] or 0}ll))"

    # --- Instructions: each returns C++

    def op_mov(self, i: Instruction) -> str:
        i.only()
        to, value = i.operands
        if to.startswith("{") or value.startswith("{"):
            packed = to.startswith("{")
            parts = split((to if packed else value)[1:-1])
            width = size(i.type) * 8 // len(parts)
            if packed:
                whole = self.read(value, f"u{width * len(parts)}")
                pieces = [self.write(p, f"std::uint{width}_t(whole >> {k * width})") for k, p in enumerate(parts)]
                return f"{{ const std::uint64_t whole = {whole}; {' '.join(pieces)} }}"
            pieces = [f"std::uint64_t({self.read(p, f'u{width}')}) << {k * width}" for k, p in enumerate(parts)]
            return self.write(to, f"{C_TYPES[f'u{width * len(parts)}']}({' | '.join(pieces)})")
        return self.write(to, self.read(value, i.type))

    def op_cvta(self, i: Instruction) -> str:
        i.only("to", "global", "shared", "local")
        to, value = i.operands
        address = self.read(value, "u64")
        if "shared" in i.modifiers:
            bit = "cuda_host::shared_window_bit"
            return self.write(to, f"{address} & ~{bit}" if "to" in i.modifiers else f"{address} | {bit}")
        return self.write(to, address)

    def binary(self, i: Instruction, operator: str, *modifiers: str) -> str:
        # Integers as unsigned ones, which wrap; where the sign matters, the instruction is not written by this
        i.only(*modifiers)
        type = i.type if i.type[0] in "fp" else f"u{i.type[1:]}"
        a, b = (self.read(o, type) for o in i.operands[1:])
        return self.write(i.operands[0], f"{C_TYPES[type]}({a} {operator} {b})")

    def op_add(self, i: Instruction) -> str:
        return self.binary(i, "+", "rn")

    def op_sub(self, i: Instruction) -> str:
        return self.binary(i, "-", "rn")

    def op_and(self, i: Instruction) -> str:
        return self.binary(i, "&")

    def op_or(self, i: Instruction) -> str:
        return self.binary(i, "|")

    def op_xor(self, i: Instruction) -> str:
        return self.binary(i, "^")

    def product(self, i: Instruction) -> str:
        """a * b of mul and mad: its low half, its high half, or all of it."""
        i.only("lo", "hi", "wide", "rn")
        a, b = (self.read(o, i.type) for o in i.operands[1:3])
        if i.type[0] == "f":
            return f"{a} * {b}"
        if "hi" in i.modifiers:
            return f"mul_hi<{C_TYPES[i.type]}>({a}, {b})"
        if "wide" in i.modifiers:
            wide = C_TYPES[self.wide(i)]
            return f"{wide}({wide}({a}) * {wide}({b}))"
        low = C_TYPES[f"u{max(32, size(i.type) * 8)}"]  # 16 bits would be promoted to signed integers
        return f"{C_TYPES[f'u{i.type[1:]}']}({low}({a}) * {low}({b}))"

    @staticmethod
    def wide(i: Instruction) -> str:
        return f"{i.type[0]}{size(i.type) * 16}"

    def op_mul(self, i: Instruction) -> str:
        return self.write(i.operands[0], self.product(i))

    def op_mad(self, i: Instruction) -> str:
        type = self.wide(i) if "wide" in i.modifiers else i.type
        unsigned = f"u{type[1:]}"
        c = C_TYPES[unsigned]
        return self.write(i.operands[0], f"{c}({c}({self.product(i)}) + {self.read(i.operands[3], unsigned)})")

    def op_fma(self, i: Instruction) -> str:
        i.only("rn", "rm", "rp", "rz")
        function = "fma_rn"
        for modifier, mode in {"rm": "FE_DOWNWARD", "rp": "FE_UPWARD", "rz": "FE_TOWARDZERO"}.items():
            if modifier in i.modifiers:
                if i.type != "f32":
                    raise Unknown("rounding of a double")
                function = f"rounded_fma<{mode}>"
        return self.call(i, function, i.type, i.type, i.type)

    def call(self, i: Instruction, function: str, *types: str) -> str:
        """to = function(operands as these types)"""
        values = [self.read(operand, type) for operand, type in zip(i.operands[1:], types)]
        return self.write(i.operands[0], f"{function}({', '.join(values)})")

    def op_div(self, i: Instruction) -> str:
        i.only("rn", "full", "approx")
        return self.write(i.operands[0], f"{self.read(i.operands[1], i.type)} / {self.read(i.operands[2], i.type)}")

    def op_rem(self, i: Instruction) -> str:
        i.only()
        return self.write(i.operands[0], f"{self.read(i.operands[1], i.type)} % {self.read(i.operands[2], i.type)}")

    def extremum(self, i: Instruction, function: str) -> str:
        i.only("NaN")
        suffix = "_nan" if "NaN" in i.modifiers else ""
        return self.call(i, f"{function}{suffix}<{C_TYPES[i.type]}>", i.type, i.type)

    def op_min(self, i: Instruction) -> str:
        return self.extremum(i, "minimum")

    def op_max(self, i: Instruction) -> str:
        return self.extremum(i, "maximum")

    def op_neg(self, i: Instruction) -> str:
        i.only()
        type = i.type if i.type[0] == "f" else f"u{i.type[1:]}"
        return self.write(i.operands[0], f"{C_TYPES[type]}(-{self.read(i.operands[1], type)})")

    def op_abs(self, i: Instruction) -> str:
        i.only()
        return self.call(i, "std::abs", i.type)

    def op_not(self, i: Instruction) -> str:
        i.only()
        operator = "!" if i.type == "pred" else "~"
        return self.write(i.operands[0], f"{C_TYPES[i.type]}({operator}{self.read(i.operands[1], i.type)})")

    def op_shl(self, i: Instruction) -> str:
        i.only()
        return self.call(i, f"shl<{C_TYPES[f'u{i.type[1:]}']}>", f"u{i.type[1:]}", "u32")

    def op_shr(self, i: Instruction) -> str:
        i.only()
        return self.call(i, f"shr<{C_TYPES[i.type]}>", i.type, "u32")

    def op_shf(self, i: Instruction) -> str:
        i.only("l", "r", "wrap", "clamp")
        limit = f"({self.read(i.operands[3], 'u32')} & 31)"
        if "clamp" in i.modifiers:
            limit = f"std::min<std::uint32_t>({self.read(i.operands[3], 'u32')}, 32)"
        a, b = (self.read(o, "u32") for o in i.operands[1:3])
        return self.write(i.operands[0], f"shf_{'l' if 'l' in i.modifiers else 'r'}({a}, {b}, {limit})")

    def op_bfi(self, i: Instruction) -> str:
        i.only()
        return self.call(i, "bfi", f"u{i.type[1:]}", f"u{i.type[1:]}", "u32", "u32")

    def op_bfe(self, i: Instruction) -> str:
        i.only()
        return self.call(i, f"bfe<{C_TYPES[i.type]}>", i.type, "u32", "u32")

    def op_prmt(self, i: Instruction) -> str:
        i.only()
        return self.call(i, "prmt", "u32", "u32", "u32")

    def op_lop3(self, i: Instruction) -> str:
        i.only()
        return self.call(i, "lop3", "u32", "u32", "u32", "u32")

    def op_popc(self, i: Instruction) -> str:
        i.only()
        return self.write(
            i.operands[0], f"std::uint32_t(__builtin_popcountll({self.read(i.operands[1], f'u{i.type[1:]}')}))"
        )

    def op_brev(self, i: Instruction) -> str:
        i.only()
        if i.type != "b32":
            raise Unknown("width")
        return self.call(i, "brev", "u32")

    def op_bfind(self, i: Instruction) -> str:
        i.only("shiftamt")
        if i.type != "u32":
            raise Unknown("type")
        return self.call(i, f"bfind<{str('shiftamt' in i.modifiers).lower()}>", "u32")

    def op_clz(self, i: Instruction) -> str:
        i.only()
        if i.type != "b32":
            raise Unknown("width")
        return self.write(i.operands[0], f"std::uint32_t(__clz(int({self.read(i.operands[1], 'u32')})))")

    def op_copysign(self, i: Instruction) -> str:
        i.only()
        return self.write(
            i.operands[0], f"std::copysign({self.read(i.operands[2], i.type)}, {self.read(i.operands[1], i.type)})"
        )

    def elementary(self, i: Instruction, function: str) -> str:
        i.only("rn", "approx", "ftz")
        value = self.read(i.operands[1], i.type)
        flush = ("ftz({})" if i.type == "f32" else "{}") if "ftz" in i.modifiers else "{}"
        return self.write(i.operands[0], flush.format(f"{function}({flush.format(value)})"))

    def op_rcp(self, i: Instruction) -> str:
        return self.elementary(i, "rcp")

    def op_sqrt(self, i: Instruction) -> str:
        return self.elementary(i, "std::sqrt")

    def op_rsqrt(self, i: Instruction) -> str:
        return self.elementary(i, "ptx::rsqrt")

    def op_ex2(self, i: Instruction) -> str:
        return self.elementary(i, "std::exp2")

    def op_lg2(self, i: Instruction) -> str:
        return self.elementary(i, "std::log2")

    def op_tanh(self, i: Instruction) -> str:
        return self.elementary(i, "std::tanh")

    def op_selp(self, i: Instruction) -> str:
        i.only()
        to, a, b, predicate = i.operands
        return self.write(to, f"{self.read(predicate, 'pred')} ? {self.read(a, i.type)} : {self.read(b, i.type)}")

    def op_setp(self, i: Instruction) -> str:
        comparison, *others = i.modifiers[:-1]
        a, b = (self.read(o, i.type) for o in i.operands[1:3])
        if comparison in COMPARE:
            value = f"({a} {COMPARE[comparison]} {b})"
        elif comparison in COMPARE_OR_NAN:
            value = f"!({a} {COMPARE_OR_NAN[comparison]} {b})"
        elif comparison in ("nan", "num"):
            value = f"{'!' if comparison == 'num' else ''}(std::isnan({a}) || std::isnan({b}))"
        else:
            raise Unknown(f"comparison .{comparison}")
        if others:
            operator = {"and": "&&", "or": "||", "xor": "!="}.get(others[0])
            if not operator or len(others) > 1:
                raise Unknown(f"modifier .{others[0]}")
            value = f"{value} {operator} {self.read(i.operands[3], 'pred')}"
        if "|" in i.operands[0]:
            raise Unknown("second result")
        return self.write(i.operands[0], value)

    def op_cvt(self, i: Instruction) -> str:
        *modifiers, to, source = i.modifiers
        if strange := [m for m in modifiers if m not in ("rn", "rna", "rz", "rzi", "rni", "rmi", "rpi", "sat")]:
            raise Unknown(f"modifier .{strange[0]}")
        small = {"f16": "half", "bf16": "bf16"}
        if to in ("f16x2", "bf16x2"):
            if modifiers != ["rn"] or source != "f32":
                raise Unknown(f"rounding {modifiers}")
            high, low = (
                f"std::uint32_t(cuda_host::to_{small[to[:-2]]}({self.read(o, 'f32')}))" for o in i.operands[1:]
            )
            return self.write(i.operands[0], f"{high} << 16 | {low}")
        if to in small:
            if modifiers != ["rn"] or source != "f32":
                raise Unknown(f"rounding {modifiers}")
            return self.write(i.operands[0], f"cuda_host::to_{small[to]}({self.read(i.operands[1], 'f32')})")
        if to == "tf32":
            if modifiers != ["rna"]:
                raise Unknown(f"rounding {modifiers}")
            return self.write(i.operands[0], f"to_tf32({self.read(i.operands[1], 'f32')})")
        if source in small:
            if modifiers or to != "f32":
                raise Unknown(f"conversion .{to}.{source}")
            return self.write(i.operands[0], f"cuda_host::from_{small[source]}({self.read(i.operands[1], 'u16')})")
        value = self.read(i.operands[1], source)
        for modifier, function in {"rzi": "trunc", "rni": "nearbyint", "rmi": "floor", "rpi": "ceil"}.items():
            if modifier in modifiers:
                value = f"std::{function}({value})"
        if "rz" in modifiers or "rna" in modifiers:
            raise Unknown("rounding towards zero")
        if "sat" in modifiers:
            if to[0] != "f":
                raise Unknown("saturation of integers")
            value = f"saturate({value})"
        if source[0] == "f" and to[0] != "f":
            return self.write(i.operands[0], f"to_integer<{C_TYPES[to]}>({value})")
        return self.write(i.operands[0], f"{C_TYPES[to]}({value})")

    # --- Memory

    def space(self, i: Instruction) -> str:
        return next((m for m in i.modifiers if m in ("global", "shared", "local", "param")), "generic")

    def pointer(self, i: Instruction, address: str, part: int, whole: int, access: str) -> str:
        space = self.space(i)
        space = "generic" if space == "local" else space
        window = f"window<{C_TYPES[i.type]}, Space::{space}>"
        return f"{window}({self.address(address)}, {part}, {whole}, Access::{access}, local, {self.place(i)})"

    def order(self, i: Instruction) -> str | None:
        order = next((m for m in i.modifiers if m in ORDERS), None)
        if order and order != "volatile" and not SCOPES & set(i.modifiers):
            raise Unknown("scope of an order")
        return ORDERS[order] if order else None

    def transfer(self, i: Instruction, registers: str, address: str) -> list[tuple[str, str]]:
        """Register and pointer of each part of a load or store."""
        i.only("global", "shared", "local", "param", "nc", "v2", "v4", "L1::no_allocate", *ORDERS, *SCOPES)
        parts = split(registers[1:-1]) if registers.startswith("{") else [registers]
        access = "store" if i.name == "st" else "read_only_load" if "nc" in i.modifiers else "load"
        bytes = size(i.type)
        return [
            (register, self.pointer(i, address, k * bytes, len(parts) * bytes, access))
            for k, register in enumerate(parts)
        ]

    def op_ld(self, i: Instruction) -> str:
        if self.space(i) == "param":
            i.only("param", "v2", "v4")
            # By name, or by what a `mov` made of a name: an address in the parameters
            parts = split(i.operands[0][1:-1]) if i.operands[0].startswith("{") else [i.operands[0]]
            loads = " ".join(
                self.write(part, f"parameter<{C_TYPES[i.type]}>(from + {k * size(i.type)})")
                for k, part in enumerate(parts)
            )
            return f"{{ const auto* from = reinterpret_cast<const char*>({self.address(i.operands[1])}); {loads} }}"
        order = self.order(i)
        load = f"load_ordered<{C_TYPES[i.type]}, {order}>({{}})" if order else "*{}"
        # All pointers before the first register changes, which may be the address
        transfers = self.transfer(i, *i.operands)
        pointers = " ".join(f"const auto* p{k} = {pointer};" for k, (_, pointer) in enumerate(transfers))
        loads = " ".join(self.write(register, load.format(f"p{k}")) for k, (register, _) in enumerate(transfers))
        return f"{{ {pointers} {loads} }}"

    def op_st(self, i: Instruction) -> str:
        order = self.order(i)
        stores = []
        for register, pointer in self.transfer(i, i.operands[1], i.operands[0]):
            value = self.read(register, i.type)
            stores.append(f"store_ordered<{C_TYPES[i.type]}, {order}>({pointer}, {value});" if order
                          else f"*{pointer} = {value};")  # fmt: skip
        return f"{{ {' '.join(stores)} }}"

    def atomic(self, i: Instruction, to: str, operands: list[str]) -> str:
        functions = [m for m in i.modifiers if m in ("add", "min", "max", "or", "and", "exch", "cas")]
        i.only("global", "shared", *functions, *ORDERS, *SCOPES)
        if len(functions) != 1:
            raise Unknown("atomic operation")
        type = f"u{i.type[1:]}" if i.type[0] == "b" else i.type
        pointer = self.pointer(i, operands[0], 0, size(i.type), "store")
        values = "".join(f", {self.read(o, type)}" for o in operands[1:])
        order = next((ORDERS[m] for m in i.modifiers if m in ORDERS), ORDERS["relaxed"])
        return self.write(to, f"atom_{functions[0]}<{order}, {C_TYPES[type]}>({pointer}{values})")

    def op_atom(self, i: Instruction) -> str:
        return self.atomic(i, i.operands[0], i.operands[1:])

    def op_red(self, i: Instruction) -> str:
        return self.atomic(i, "_", i.operands)

    # --- Threads that meet

    def op_bar(self, i: Instruction) -> str:
        if i.modifiers == ["warp", "sync"]:
            return f"cuda_host::warp_barrier({self.read(i.operands[0], 'u32')}, {self.place(i)});"
        if i.modifiers[0] == "red" and i.operands[1] == "0":
            i.only("red", "popc", "and", "or")
            vote = {"popc": "count", "and": "all", "or": "any"}[i.modifiers[1]]
            predicate = self.read(i.operands[2], "pred")
            value = f"cuda_host::block_vote(cuda_host::Vote::{vote}, {predicate}, {self.place(i)})"
            return self.write(i.operands[0], f"std::uint32_t({value})" if vote == "count" else f"{value} != 0")
        if i.modifiers not in (["sync"], ["sync", "aligned"]) or i.operands != ["0"]:
            raise Unknown("barrier other than __syncthreads()")
        return f"cuda_host::block_barrier({self.place(i)});"

    op_barrier = op_bar

    def op_shfl(self, i: Instruction) -> str:
        i.only("sync", "up", "down", "bfly", "idx")
        to, _, in_range = i.operands[0].partition("|")
        values = ", ".join(self.read(o, "u32") for o in i.operands[1:])
        shuffled = self.write(to, f"shfl<'{i.modifiers[1][0]}'>({values}, in_range, {self.place(i)})")
        return f"{{ bool in_range; {shuffled} {self.write(in_range, 'in_range') if in_range else ''} }}"

    def op_vote(self, i: Instruction) -> str:
        i.only("sync", "ballot", "any", "all")
        to, predicate, mask = i.operands
        ballot = f"cuda_host::ballot({self.read(mask, 'u32')}, {self.read(predicate, 'pred')}, {self.place(i)})"
        if "any" in i.modifiers:
            return self.write(to, f"{ballot} != 0")
        return self.write(to, f"{ballot} == {self.read(mask, 'u32')}" if "all" in i.modifiers else ballot)

    def op_mma(self, i: Instruction) -> str:
        shapes = {"m16n8k8": "tf32", "m16n8k16": "bf16"}
        element = shapes.get(i.modifiers[2]) if len(i.modifiers) == 9 else None
        if i.modifiers != ["sync", "aligned", i.modifiers[2], "row", "col", "f32", element, element, "f32"]:
            raise Unknown("mma shape")
        d, a, b, c = (split(o[1:-1]) for o in i.operands)
        inputs = [", ".join(self.read(o, type) for o in group) for group, type in ((c, "f32"), (a, "u32"), (b, "u32"))]
        return (f"{{ float d[4] = {{{inputs[0]}}}; const std::uint32_t a[4] = {{{inputs[1]}}}, b[2] = {{{inputs[2]}}}; "
                f"cuda_host::mma_{element}(d, a, b, {self.place(i)}); "
                + " ".join(self.write(o, f"d[{k}]") for k, o in enumerate(d)) + " }")  # fmt: skip

    # --- Control

    def op_bra(self, i: Instruction) -> str:
        if i.modifiers not in ([], ["uni"]):
            raise Unknown(f"modifier .{i.type}")
        return f"goto {label(i.operands[0])};"

    def op_brx(self, i: Instruction) -> str:
        cases = " ".join(f"case {k}: goto {label(t)};" for k, t in enumerate(self.targets[i.operands[1]]))
        return f"switch ({self.read(i.operands[0], 'u32')}) {{ {cases} }}"

    def op_ret(self, i: Instruction) -> str:
        return "return;"

    op_exit = op_ret

    def op_trap(self, i: Instruction) -> str:
        return f'cuda_host::fail("trap", {self.place(i)});'

    def op_nanosleep(self, i: Instruction) -> str:
        return "cuda_host::yield();"

    # --- Statements

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            _, type, names = text.split(None, 2)
            return self.declare(type[1:], split(names))
        if text.startswith(".branchtargets"):
            return None  # read before, by `body`
        if text.startswith(".pragma"):
            return None  # hints for the compiler behind PTX
        if text.startswith("."):
            raise Unknown(f"directive {text}")
        match = re.fullmatch(r"(?:@(!?)(\S+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
        if not match:
            raise Unknown(text)
        negated, predicate, opcode, operands = match.groups()
        name, *modifiers = opcode.split(".")
        instruction = Instruction(text, line, name, modifiers, split(operands))
        handler: Callable[[Instruction], str] | None = getattr(self, f"op_{name}", None)
        if not handler:
            raise Unknown(f"instruction {name}")
        condition = f"if ({negated}{self.read(predicate, 'pred')}) " if predicate else ""
        self.code.append(condition + handler(instruction))
        return None

    def body(self, text: str, first_line: int) -> None:
        """Translates what is between a kernel's braces."""
        self.arrays(text)
        for name, targets in re.findall(r"(\$?\w+):\s*\.branchtargets\s+([^;]+);", text):
            self.targets[name] = split(targets)
        text = re.sub(r"\.(shared|local)\s[^;]*;", lambda m: "\n" * m[0].count("\n"), text)
        position = 0
        while match := re.compile(r"\s*(\.loc[^\n]*|[{}]|\$?[\w$]+:(?!:)|[^;]*;)").match(text, position):
            token, line = match[1], first_line + text.count("\n", 0, match.start(1))
            position = match.end()
            try:
                if token.startswith(".loc"):
                    file, source_line = location(token, self.files)
                    self.file, self.source_line = f'"{file}"', source_line
                    self.code.append(f"\n#line {self.source_line} {self.file}\n")
                elif token == "{":
                    self.scopes.append({})
                elif token == "}":
                    self.scopes.pop()
                elif token.endswith(":"):
                    self.code.append(f"{label(token[:-1])}:;")
                else:
                    self.statement(token[:-1].strip(), line)
            except Unknown as error:
                where = f"PTX line {line}, kernel {self.name}"
                raise Unknown(f"{where}: {error} is not known to the translator: {token}") from error
        if text[position:].strip():
            raise Unknown(f"kernel {self.name}: cannot read {text[position:].strip()[:60]}")

    def arrays(self, text: str) -> None:
        """Places the static shared arrays, the dynamic one behind them, and the thread's own array."""
        offset = 0
        dynamic = [name for name, place in self.shared.items() if place < 0]
        for alignment, name, bytes in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];", text):
            offset = -(-offset // int(alignment)) * int(alignment)
            self.shared[name] = offset
            offset += int(bytes)
        self.static_shared = -(-offset // 16) * 16
        self.shared |= dict.fromkeys(dynamic, self.static_shared)
        if found := re.search(r"\.local \.align \d+ \.b8\s+(\w+)\[(\d+)\];", text):
            self.local, self.local_bytes = found[1], int(found[2])

    def function(self) -> str:
        local = f"alignas(16) char local_array[{max(1, self.local_bytes)}];\n"
        local += f"[[maybe_unused]] const Local local{{std::uint64_t(local_array), {self.local_bytes}}};\n"
        lines = "\n".join(["[[maybe_unused]] " + d for d in self.declarations] + self.code)
        return f"static void run_{self.name}([[maybe_unused]] const char* parameters) {{\n{local}{lines}\n}}\n"


def location(directive: str, files: dict[str, str]) -> tuple[str, int]:
    """File and line of a .loc. An intrinsic that one of the toolkit's headers defines is where the kernel calls it."""
    numbers = directive.replace(",", " ").split()
    file, line = files.get(numbers[1], "?"), int(numbers[2])
    if re.search(r"/(sm_\d+|cuda|device)_\w+\.hp*$", file) and "inlined_at" in numbers:
        caller = numbers.index("inlined_at") + 1
        return files.get(numbers[caller], "?"), int(numbers[caller + 1])
    return file, line


def label(name: str) -> str:
    return "L_" + name.replace("$", "")


def parameters(text: str) -> dict[str, int]:
    """The offset of each kernel parameter, laid out as a struct."""
    offsets, offset = {}, 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        if array := re.fullmatch(r"\.param \.align (\d+) \.b8 (\w+)\[(\d+)\]", declaration):
            alignment, name, bytes = int(array[1]), array[2], int(array[3])
        elif scalar := re.fullmatch(r"\.param \.(\w+)(?: \.ptr)?(?: \.global)?(?: \.align \d+)? (\w+)", declaration):
            alignment, name, bytes = size(scalar[1]), scalar[2], size(scalar[1])
        else:
            raise Unknown(f"parameter {declaration}")
        offset = -(-offset // alignment) * alignment
        offsets[name] = offset
        offset += bytes
    return offsets


def translate(text: str) -> str:
    """C++ of a PTX module, for one translation unit. Raises Unknown where something has no meaning here."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M))
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    if function := re.search(r"^\s*(?:\.\w+ )*\.func\b.*", text, re.M):
        raise Unknown(f"a function that is called is not known to the translator: {function[0].strip()}")
    dynamic = re.findall(r"\.extern \.shared [^;]*?\.b8 (\w+)\[\];", text)
    functions, table = [], []
    for entry in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", text, re.S):
        end, depth = entry.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        kernel = Kernel(entry[1], files, parameters(" ".join(entry[2].split())), dict.fromkeys(dynamic, -1))
        kernel.body(text[entry.end() : end - 1], 1 + text.count("\n", 0, entry.end()))
        functions.append(kernel.function())
        table.append(f'    {{"{kernel.name}", run_{kernel.name}, {kernel.static_shared}}},\n')
    entries = "cuda_host_ptx_entries[]"
    return "".join([
        '#include "ptx.hpp"\nusing namespace ptx;\nnamespace {\n', *functions, '}\n#line 1 "table"\nextern "C" {\n',
        f"extern const cuda_host::PtxEntry {entries};\nconst cuda_host::PtxEntry {entries} = {{\n", *table,
        "    {nullptr, nullptr, 0}};\n}\n",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(translate(Path(sys.argv[1]).read_text()))
