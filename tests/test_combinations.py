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

# Words of a problem that are as good for a layer: "project" is its proj_size, "mask" its recurrent dropout, "h0" none.
SHARED = [*("lengths", "half", "empty", "nobias", "reset", "reset0", "mask", "clip", "project", "batch", "packed")]
SHARED += ["strided", "states", "checkpoints"]
RATES = {"dropout": 0.3, "input_dropout": 0.2, "weight_dropout": 0.25, "zoneout_h": 0.3, "zoneout_c": 0.4}
RECURRENT, CLIP = 0.35, 0.3
OWN = {
    "layers2": "two layers",
    "layers3": "three layers",
    "bidirectional": "in both directions",
    **{name: f"a probability of {p}" for name, p in RATES.items()},
    "variational": "the same elements dropped at every step",
    "state_h": "an initial h is given",
    "state_c": "an initial c is given",
    "dstate_h": "there is a gradient of the final h",
    "dstate_c": "there is a gradient of the final c",
    "nody": "there is no gradient of y",
    "some": "only some of the gradients are wanted",
    "threads2": "two threads",
    "threads3": "three threads",
}
EXCLUDE = [{"layers2", "layers3"}, {"threads2", "threads3"}]
NEEDS_C = {"zoneout_c", "state_c", "dstate_c"}


@dataclass(frozen=True)
class Case:
    """A layer, what it is called with, and which gradients are wanted; `Case.parse(str(case)) == case`."""

    problem: Problem
    own: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Case:
        head, _, words = text.rpartition(":")
        rest = [word for word in words.split(",") if word not in OWN]
        return cls(Problem.parse(f"{head}:{','.join(rest) or 'train'}"), frozenset(words.split(",")) & OWN.keys())

    def __str__(self) -> str:
        return ",".join([str(self.problem), *(word for word in OWN if word in self.own)])

    def __contains__(self, word: str) -> bool:
        return word in self.own or word in self.problem.options

    def with_word(self, word: str) -> Case:
        """With one word more, or as it is where that does not go with the cell or with the words that it has."""
        cell, own, options = gw.cells()[self.problem.cell], self.own, self.problem.options
        if word in OWN:
            own |= {word}
            fits = (cell["has_c"] or word not in NEEDS_C) and (cell["product"] or word != "weight_dropout")
            fits = fits and not any(pair <= own for pair in EXCLUDE)
        else:
            options |= {word}
            fits = problems.fits(self.problem.cell, options) and not (word == "nobias" and cell["normed"])
        return Case(replace(self.problem, options=options), own) if fits else self

    def count(self, what: str) -> int:
        return next((many for many in (2, 3) if f"{what}{many}" in self), 1)

    def rate(self, name: str) -> float:
        return RATES[name] * (name in self)

    def layer(self, **machine: Any) -> Layer:
        p = self.problem
        layer = Layer(
            p.cell, p.I, p.H, self.count("layers"), bidirectional="bidirectional" in self, bias="nobias" not in self,
            batch_first="batch" in self, proj_size=p.R * ("project" in self), cell_clip=CLIP if "clip" in self else None,
            dropout=self.rate("dropout"), input_dropout=self.rate("input_dropout"),
            weight_dropout=self.rate("weight_dropout"), recurrent_dropout=RECURRENT * ("mask" in self),
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
    p, inputs = case.problem, problems.draw(case.problem)
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    N = p.N if inputs.batch_sizes is None else int(inputs.batch_sizes[:1].sum())

    def normal(*shape: int) -> Array:
        return rng.normal(size=shape).astype(inputs.x.dtype)

    def states(word: str) -> Results:
        sizes = {"h": (layer.num_layers * layer.directions, N, p.R), "c": (layer.num_layers * layer.directions, N, p.H)}
        return {name: normal(*size) for name, size in sizes.items() if word + name in case}

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

    options = {"reset": call.reset, "batch_sizes": call.batch_sizes, "reset_to": "zero" if "reset0" in case else "initial"}
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
    return a * torch.tensor(~numpy_kept(seed, (min(T, 1) if same_at_every_step else T, N, K), p) / (1 - p))


def stack(case: Case, leaves: Tensors, call: Call, seed: int | None) -> Tensors:
    """y, h and c of loops in PyTorch, one on the other; without a seed, those of inference."""
    x, N, D = leaves["x"], leaves["h"].shape[1], 1 + ("bidirectional" in case)
    lengths, reset = call.lengths, call.reset
    if call.batch_sizes is not None:  # rows are the valid steps, step by step
        valid = torch.tensor(np.arange(N) < call.batch_sizes[:, None])
        lengths = valid.sum(0).numpy()
        x = x.new_zeros(*valid.shape, x.shape[1]).masked_scatter(valid[:, :, None], x)
        if reset is not None:
            reset = np.zeros(valid.shape, bool)
            reset[valid] = call.reset
    elif "batch" in case:
        x, reset = x.transpose(0, 1), None if reset is None else reset.T
    options = {
        "lengths": lengths, "reset": reset, "reset_to": "zero" if "reset0" in case else None,
        "cell_clip": CLIP if "clip" in case else None,
        "zoneout_h": case.rate("zoneout_h"), "zoneout_c": case.rate("zoneout_c"),
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    outputs: list[Tensors] = []
    for k in range(len(leaves["h"])):
        layer, direction = divmod(k, D)
        suffix = f"_l{layer}" + "_reverse" * direction
        # weight_ih_l0 is w_ih of a call
        p = {f"{name[0]}_{name.split('_')[1]}": a for name, a in leaves.items() if name.endswith(suffix)}
        options["reverse"] = bool(direction)
        if seed is not None:
            state, weight, options["seed"] = (
                layers._seed_of(seed, k, use) for use in (layers._STATE, layers._WEIGHT, layers._ZONEOUT)
            )
            if direction == 0:  # both read the same
                rate, of_input = case.rate("dropout" if layer else "input_dropout"), layers._seed_of(seed, k, layers._INPUT)
                x = dropped(x, rate, of_input, "variational" in case)
            if "w_hh" in p:
                ones = torch.ones(1, *leaves["h"].shape[1:])
                options["h_mask"] = dropped(ones, RECURRENT * ("mask" in case), state)[0].numpy()
                p["w_hh"] = dropped(p["w_hh"][None], case.rate("weight_dropout"), weight)[0]
        states = {f"{s}0": leaves[s][k] for s in "hc" if s in leaves}
        outputs.append(torch_loop(case.problem.cell, options, {**p, **states, "x": x}))
        if direction == D - 1:
            x = torch.cat([out["y"] for out in outputs[-D:]], 2)
    y = x[valid] if call.batch_sizes is not None else x.transpose(0, 1) if "batch" in case else x
    return {"y": y, **{s: torch.stack([out[f"{s}n"] for out in outputs]) for s in "hc" if s in leaves}}


def truth(case: Case, weights: Results, call: Call, seed: int | None) -> Results:
    """What `run` returns, by the stack of loops in float64."""
    p, N = case.problem, case.problem.N if call.batch_sizes is None else int(call.batch_sizes[:1].sum())
    sizes = {"h": p.R, "c": p.H} if gw.cells()[p.cell]["has_c"] else {"h": p.R}
    count = case.count("layers") * (1 + ("bidirectional" in case))
    zeros = {name: np.zeros((count, N, size)) for name, size in sizes.items()}
    arrays = {**weights, "x": call.x, **zeros, **call.state}
    leaves = {name: torch.tensor(a.astype(np.float64), requires_grad=True) for name, a in arrays.items()}
    inferred, out = stack(case, leaves, call, None), stack(case, leaves, call, seed)
    loss = sum((out[name] * torch.tensor(d)).sum() for name, d in {"y": call.dy, **call.dstate}.items() if d is not None)
    gradients = torch.autograd.grad(loss + 0 * leaves["x"].sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    results = {f"inferred {name}": a for name, a in inferred.items()} | out
    for name, gradient in zip(leaves, gradients):
        if call.wanted is None or ("state" if name in sizes else name) in call.wanted:
            results["dstate_" * (name in sizes) + "d" * (name not in sizes) + name] = gradient
    return {name: a.detach().numpy() for name, a in results.items()}


def bound(case: Case, dtype: np.dtype[Any], name: str) -> float:
    """The largest relative error accepted of a result: that of `gatewise check`, once for each layer.

    What a layer gets wrong the next one hands on, about as large as it was: weights of 1/sqrt(H) and gates with slopes
    below 1 do not amplify it. So errors add up, on the way up and, for a gradient, on the way down again.
    """
    p, L = case.problem, case.count("layers")
    kind = name.split("_l")[0].replace("weight", "w").replace("bias", "b")  # dweight_ih_l0 -> dw_ih
    wide = p.R * (1 + ("bidirectional" in case))
    inputs = [p.I] + [wide] * (L - 1)
    return sum(gw.check.bound(p.cell, dtype.name, (p.T, p.N, I, p.H), "dh0" if kind == "dstate" else kind) for I in inputs)


def check(case: Case) -> float:
    """Assert that both backends are right, and return the largest error as a share of its bound."""
    cpu = case.layer(backend="cpu", dtype=problems.DTYPES[case.problem.dtype], num_threads=case.count("threads"))
    exact = case.layer(backend="reference", dtype=np.float64)
    exact.load_state_dict(cpu.state_dict())
    call, worst = draw(case, cpu), 0.0
    want: Results | None = None
    for layer in (cpu, exact):
        results, seed = run(case, layer, call if layer is cpu else call.astype(np.float64))
        want = want or truth(case, layer.state_dict(), call, seed)
        assert results.keys() == want.keys(), f"{case}: results {set(results) ^ set(want)}"
        for name, value in results.items():
            assert value.dtype == layer.dtype, f"{case}: {name} is {value.dtype}"
            scale = max(np.abs(a).max(initial=0.0) for other, a in want.items() if other[0] == "d" == name[0] or other[0] != "d" != name[0])
            error, limit = problems.distance(value, want[name]), bound(case, layer.dtype, name) * scale + np.finfo(layer.dtype).tiny
            if not (error <= limit):
                raise AssertionError(f"{case}: {layer.backend}: {name} is off by {error:.3g}, more than {limit:.3g}")
            worst = max(worst, error / limit)
    return worst


@st.composite
def cases(drawn: st.DrawFn) -> str:
    cell = drawn(st.sampled_from(list(gw.cells())))
    least = 8 if gw.cells()[cell]["normed"] else 1  # of a few numbers, the deviation may be next to nothing
    T, N, I, H = (drawn(st.integers(*range_)) for range_ in ((0, 10), (0, 6), (1, 12), (least, 40)))
    case = Case(Problem(cell, T, N, I, H, drawn(st.sampled_from(["f32", "f64"])), frozenset()))
    for word in drawn(st.lists(st.sampled_from([*SHARED, *OWN]), min_size=3, max_size=20, unique=True)):
        case = case.with_word(word)
    return str(case)


@given(cases())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_combination(text: str) -> None:
    pytest.importorskip("numba")
    case = Case.parse(text)
    assert str(case) == text
    check(case)


if __name__ == "__main__":
    for text in sys.argv[1:]:
        print(f"{text}: at most {100 * check(Case.parse(text)):.0f} % of the bound")
