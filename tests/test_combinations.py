"""Whole layers with anything at once: random draws out of every option that a layer and its calls have.

A case is one string, a problem of gatewise.problems with more words in it, and always means the same numbers:

    lstm:T7,N3,I5,H9:f32:lengths,reset,mask,project,states,layers2,bidirectional,dropout,zoneout_c,state_h,dstate_h

A failure prints its string, and `python tests/test_combinations.py STRING` runs it again. Inference and training, on
both backends, are held to a stack of loops in PyTorch (loops.py) in float64: time-major, padded, every mask written out
from its definition, gradients by autograd. So what the backends have in common, all of layers.py, is judged as well.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gatewise as gw
import problems
from gatewise import layers
from gatewise.layers import Layer
from loops import numpy_kept, torch_loop
from problems import Problem

Array = np.ndarray
Results = dict[str, Array]
Tensors = dict[str, torch.Tensor]

# Of each group one word, or none. The words of a problem are as good for a layer: "mask" is its recurrent dropout,
# "project" its proj_size. The others are a layer's own, or of its call: which parts there are of the initial state and
# of the gradients coming in, and that only some gradients are wanted.
CHOICES = [
    group.split()
    for group in (
        *("layers2 layers3", "bidirectional", "nobias", "project", "clip", "threads2 threads3", "states checkpoints"),
        *("dropout", "input_dropout", "variational", "weight_dropout", "mask", "zoneout_h", "zoneout_c"),
        *("lengths half packed", "batch", "strided", "reset reset0"),
        *("state_h", "state_c", "dstate_h", "dstate_c", "nody", "some"),
    )
]
OWN = [word for words in CHOICES for word in words if word not in problems.OPTIONS]
NEEDS_C = {"zoneout_c", "state_c", "dstate_c"}
RATES = {"dropout": 0.3, "input_dropout": 0.2, "weight_dropout": 0.25, "mask": 0.35, "zoneout_h": 0.3, "zoneout_c": 0.4}


@dataclass(frozen=True)
class Case:
    """A layer, what it is called with, and which gradients are wanted; `Case.parse(str(case)) == case`."""

    problem: Problem
    own: frozenset[str] = frozenset()  # words out of OWN

    @classmethod
    def parse(cls, text: str) -> Case:
        head, _, words = text.rpartition(":")
        rest = [word for word in words.split(",") if word not in OWN]
        return cls(Problem.parse(f"{head}:{','.join(rest) or 'train'}"), frozenset(words.split(",")) & {*OWN})

    def __str__(self) -> str:
        return ",".join([str(self.problem), *(word for word in OWN if word in self.own)])

    def __contains__(self, word: str) -> bool:
        return word in self.own or word in self.problem.options

    def with_word(self, word: str) -> Case:
        """With one word more, or as it is where that does not go with the cell or with the words that it has."""
        cell = gw.cells()[self.problem.cell]
        if word in OWN:
            fits = (cell["has_c"] or word not in NEEDS_C) and (cell["product"] or word != "weight_dropout")
            return replace(self, own=self.own | {word}) if fits else self
        options = self.problem.options | {word}
        fits = problems.fits(self.problem.cell, options) and not (word == "nobias" and cell["normed"])
        return replace(self, problem=replace(self.problem, options=options)) if fits else self

    @property
    def D(self) -> int:
        return 1 + ("bidirectional" in self)

    @property
    def N(self) -> int:
        """Rows of the batch: packed, there are none without a step."""
        return self.problem.N * (self.problem.T > 0 or "packed" not in self)

    @property
    def states(self) -> str:
        return "hc" if gw.cells()[self.problem.cell]["has_c"] else "h"

    @property
    def clip(self) -> float | None:
        return 0.3 if "clip" in self else None

    @property
    def reset_to(self) -> str:
        return "zero" if "reset0" in self else "initial"

    def count(self, what: str) -> int:
        return next((many for many in (2, 3) if f"{what}{many}" in self), 1)

    def rate(self, name: str) -> float:
        return RATES[name] * (name in self)

    def layer(self, **machine: Any) -> Layer:
        p = self.problem
        layer = Layer(
            p.cell, p.I, p.H, self.count("layers"), bidirectional="bidirectional" in self, bias="nobias" not in self,
            batch_first="batch" in self, proj_size=p.R * ("project" in self), cell_clip=self.clip,
            dropout=self.rate("dropout"), input_dropout=self.rate("input_dropout"),
            weight_dropout=self.rate("weight_dropout"), recurrent_dropout=self.rate("mask"),
            zoneout=(self.rate("zoneout_h"), self.rate("zoneout_c")), variational="variational" in self,
            save=next((word for word in ("states", "checkpoints") if word in self), "all"),
            random_state=1, **machine,
        )  # fmt: skip
        for weight in layer.parameters.values():  # no gain is 1, no bias 0
            weight += layer.random.normal(scale=0.1, size=weight.shape).astype(weight.dtype)
        return layer


class Call(NamedTuple):
    """What a case's layer is called with, and the gradients that come in."""

    x: Array
    lengths: Array | None
    reset: Array | None
    batch_sizes: Array | None
    state: Results  # of h and c those that are given
    dy: Array | None
    dstate: Results
    wanted: list[str] | None

    def astype(self, dtype: Any) -> Call:
        def cast(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: cast(array) for name, array in value.items()}
            return value.astype(dtype) if isinstance(value, Array) and value.dtype.kind == "f" else value

        return Call(*map(cast, self))


def draw(case: Case, layer: Layer) -> Call:
    inputs, rng = problems.draw(case.problem), np.random.default_rng(zlib.crc32(str(case).encode()))

    def normal(*shape: int) -> Array:
        return rng.normal(size=shape).astype(inputs.x.dtype)

    def states(word: str) -> Results:
        sizes = {"h": case.problem.R, "c": case.problem.H}
        return {s: normal(case.count("layers") * case.D, case.N, sizes[s]) for s in case.states if word + s in case}

    dy = None if "nody" in case else normal(*inputs.x.shape[:-1], layer.output_size)
    wanted = [name for name in (*layer.parameters, "x", "state") if rng.random() < 0.5] if "some" in case else None
    call = inputs.x, inputs.lengths, inputs.reset, inputs.batch_sizes
    return Call(*call, states("state_"), dy, states("dstate_"), wanted)


def run(case: Case, layer: Layer, call: Call) -> tuple[Results, int | None]:
    """Every result by name, of inference, of training; and the seed of the training pass."""

    def pair(state: Mapping[str, Array]) -> Any:
        return (state.get("h"), state.get("c")) if layer.has_c and state else state.get("h")

    def parts(state: Any, name: str) -> Results:
        return dict(zip((f"{name}h", f"{name}c"), state if layer.has_c else [state]))

    options = {"reset": call.reset, "reset_to": case.reset_to, "batch_sizes": call.batch_sizes}
    y, state, _ = layer.forward(call.x, pair(call.state), call.lengths, training=False, **options)
    results = {"inferred y": y, **parts(state, "inferred ")}
    y, state, tape = layer.forward(call.x, pair(call.state), call.lengths, **options)
    results |= {"y": y, **parts(state, "")}
    for name, gradient in layer.backward(tape, call.dy, pair(call.dstate), call.wanted).items():
        results |= parts(gradient, "dstate_") if name == "state" else {f"d{name}": gradient}
    return results, tape.seed


def dropped(a: torch.Tensor, p: float, seed: int, same_at_every_step: bool = False) -> torch.Tensor:
    """a [T, N, K] under the documented mask."""
    T, N, K = a.shape
    kept = ~numpy_kept(seed, (min(T, 1) if same_at_every_step else T, N, K), p)
    return a * torch.tensor(kept / (1 - p), dtype=a.dtype)


def stack(case: Case, leaves: Tensors, call: Call, seed: int | None) -> Tensors:
    """y, h and c of loops in PyTorch, one on the other; without a seed, those of inference."""
    x, N, D, lengths, reset = leaves["x"], case.N, case.D, call.lengths, call.reset
    if call.batch_sizes is not None:  # rows are the valid steps, step by step
        valid = torch.tensor(np.arange(N) < call.batch_sizes[:, None])
        lengths = valid.sum(0).numpy()
        x = x.new_zeros(*valid.shape, x.shape[1]).masked_scatter(valid[:, :, None], x)
        if reset is not None:
            reset = np.zeros(valid.shape, bool)
            reset[valid.numpy()] = call.reset
    elif "batch" in case:
        x, reset = x.transpose(0, 1), None if reset is None else reset.T
    options = {
        "lengths": lengths, "reset": reset, "reset_to": case.reset_to, "cell_clip": case.clip,
        "zoneout_h": case.rate("zoneout_h"), "zoneout_c": case.rate("zoneout_c"),
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    outputs: list[Tensors] = []
    for k in range(case.count("layers") * D):
        layer, direction = divmod(k, D)
        suffix = f"_l{layer}" + "_reverse" * direction
        # weight_ih_l0 is w_ih of a call
        p = {f"{name[0]}_{name.split('_')[1]}": a for name, a in leaves.items() if name.endswith(suffix)}
        p |= {f"{s}0": leaves[s][k] for s in case.states}
        options["reverse"] = bool(direction)
        if seed is not None:
            uses = layers._INPUT, layers._STATE, layers._WEIGHT, layers._ZONEOUT
            of_input, of_state, of_weight, options["seed"] = (layers._seed_of(seed, k, use) for use in uses)
            if direction == 0:  # what both of them read
                x = dropped(x, case.rate("dropout" if layer else "input_dropout"), of_input, "variational" in case)
            if "w_hh" in p:
                options["h_mask"] = dropped(torch.ones_like(p["h0"])[None], case.rate("mask"), of_state)[0].numpy()
                p["w_hh"] = dropped(p["w_hh"][None], case.rate("weight_dropout"), of_weight)[0]
        outputs.append(torch_loop(case.problem.cell, options, {**p, "x": x}))
        if direction == D - 1:
            x = torch.cat([out["y"] for out in outputs[-D:]], 2)
    y = x[valid] if call.batch_sizes is not None else x.transpose(0, 1) if "batch" in case else x
    return {"y": y, **{s: torch.stack([out[f"{s}n"] for out in outputs]) for s in case.states}}


def by_loops(case: Case, weights: Results, call: Call, seed: int | None, dtype: torch.dtype) -> Results:
    """What `run` returns, of the stack of loops."""
    sizes = {"h": case.problem.R, "c": case.problem.H}
    zeros = {s: np.zeros((case.count("layers") * case.D, case.N, sizes[s])) for s in case.states}
    arrays = {**weights, "x": call.x, **zeros, **call.state}
    leaves = {name: torch.tensor(a.copy(), dtype=dtype, requires_grad=True) for name, a in arrays.items()}
    results = {f"inferred {name}": a for name, a in stack(case, leaves, call, None).items()}
    results |= stack(case, leaves, call, seed)
    incoming = {name: d for name, d in {"y": call.dy, **call.dstate}.items() if d is not None}
    loss = 0 * leaves["x"].sum() + sum((results[name] * torch.tensor(d)).sum() for name, d in incoming.items())
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    for name, gradient in zip(leaves, gradients):
        if call.wanted is None or ("state" if name in zeros else name) in call.wanted:
            results[f"dstate_{name}" if name in zeros else f"d{name}"] = gradient
    return {name: a.detach().numpy() for name, a in results.items()}


def bound(case: Case, eps: float, name: str) -> float:
    """The largest relative error accepted of a result without further questions: that of `gatewise check`, per layer.

    What a layer gets wrong the next one hands on, about as large as it was, for weights of 1/sqrt(H) and gates with
    slopes below 1 do not amplify it. So errors add up: upwards and, for a gradient, downwards again.
    """
    p = case.problem
    kind = "dh0" if name.startswith("dstate") else name.split("_l")[0].replace("weight", "w").replace("bias", "b")
    inputs = [p.I] + [case.D * p.R] * (case.count("layers") - 1)
    return eps * sum(gw.check.bound(p.cell, "float64", (p.T, p.N, I, p.H), kind) for I in inputs) / np.finfo("f8").eps


@problems.one_torch_thread()
def check(case: Case) -> float:
    """Assert that both backends are right, and return the largest error as a share of its bound.

    Errors are relative to the largest output or, of gradients, to the largest that goes in or comes out: one that came
    out small may owe that to a cancellation or to a saturated gate. Where a result is off by more than `bound` the
    numbers themselves may be at fault, such as a nearly constant c that a layer norm divides by its deviation: the
    loops in float32 say so, and twice their error is accepted, in float64 as many roundings.
    """
    cpu = case.layer(backend="cpu", dtype=problems.DTYPES[case.problem.dtype], num_threads=case.count("threads"))
    reference = case.layer(backend="reference", dtype=np.float64)
    reference.load_state_dict(cpu.state_dict())
    call, worst = draw(case, cpu), 0.0
    want: Results = {}
    for layer in (cpu, reference):
        results, seed = run(case, layer, call.astype(layer.dtype))
        given = layer.state_dict(), call, seed
        want = want or by_loops(case, *given, torch.float64)
        assert results.keys() == want.keys(), f"{case}: results {set(results) ^ set(want)}"
        eps = float(np.finfo(layer.dtype).eps)
        for name, value in results.items():
            assert value.dtype == layer.dtype, f"{case}: {name} is {value.dtype}"
            alike = [a for other, a in want.items() if other.startswith("d") == name.startswith("d")]
            alike += [d for d in (call.dy, *call.dstate.values()) if d is not None and name.startswith("d")]
            scale = max(float(np.abs(a).max(initial=0.0)) for a in alike)
            error, accepted = problems.distance(value, want[name]), bound(case, eps, name) * scale
            if not error <= accepted:
                narrow = by_loops(case, *given, torch.float32)
                accepted += 2 * problems.distance(narrow[name], want[name]) * eps / float(np.finfo("f4").eps)
            if not error <= accepted:
                raise AssertionError(f"{case}: {layer.backend}: {name} is off by {error:.3g}, more than {accepted:.3g}")
            worst = max(worst, error / accepted) if error else worst
    return worst


def cases(cell: str) -> st.SearchStrategy[str]:
    least = 8 if gw.cells()[cell]["normed"] else 1  # of fewer numbers the deviation may be next to nothing

    def case(T: int, N: int, I: int, H: int, dtype: str, words: tuple[str, ...]) -> str:
        case = Case(Problem(cell, T, N, I, H, dtype, frozenset()))
        for word in filter(None, words):
            case = case.with_word(word)
        return str(case)

    sizes = (st.integers(0, 10), st.integers(0, 6), st.integers(1, 12), st.integers(least, 40))
    words = st.tuples(*(st.sampled_from(["", *words]) for words in CHOICES))
    return st.builds(case, *sizes, st.sampled_from(["f32", "f64"]), words)


@pytest.mark.parametrize("cell", gw.cells())
@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_combination(cell: str, data: st.DataObject) -> None:
    pytest.importorskip("numba")
    text = data.draw(cases(cell))
    case = Case.parse(text)
    assert str(case) == text
    check(case)


if __name__ == "__main__":
    for text in sys.argv[1:]:
        print(f"{text}: at most {100 * check(Case.parse(text)):.0f} % of the bound")
