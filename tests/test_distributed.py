"""The sepsis model in several processes: their sums are one process's, and a killed training goes on to the same bits.

Processes are started as users start them, by torchrun, over gloo on the loopback. What they did is read from their
checkpoint, which holds weights, optimizer and history.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="trains with PyTorch")
pytest.importorskip("sklearn", reason="the areas are scikit-learn's")

from gatewise import sepsis, training  # noqa: E402
from gatewise.sepsis import distributed, features, study  # noqa: E402

# 87 patients train: batches of 43 are 43, which two ranks share unevenly, again, and 1, of which one rank has none.
PATIENTS, BATCH_SIZE = 120, 43
SIZES = ["--patients", str(PATIENTS), "--hidden-size", "8", "--batch-size", str(BATCH_SIZE)]
FLOAT64 = [*SIZES, "--dtype", "float64"]
# In float64 two orders of a sum of 1e4 terms differ by 1e-14; a few updates by Adam pass that on, magnified a little.
SAME_SUMS = {"rtol": 1e-11, "atol": 1e-13}
CLIP_NORM = 0.02  # for these trainings: some of their gradients are longer, none is longer than 1
CLIPPED = f"from gatewise.sepsis import distributed as d; d.CLIP_NORM = {CLIP_NORM}; raise SystemExit(d.main())"
SECONDS = 120


# ---- processes ---------------------------------------------------------------------------------------------


@contextmanager
def torchrun(processes: int, *argv: str, restarts: int = 0, clipped: bool = False) -> Iterator[subprocess.Popen[str]]:
    """torchrun and its workers; when the block is left, none of them is."""
    start = ["--no-python", sys.executable, "-c", CLIPPED] if clipped else ["-m", "gatewise.sepsis.distributed"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--max-restarts", str(restarts), "--monitor-interval", "0.1", *start, *argv,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWISE_", "OMP_"))}
    process = subprocess.Popen(
        command, env={**environment, "GLOO_SOCKET_IFNAME": "lo"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in [process.pid, *children(process.pid)]:  # each worker leads a process group of its own
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.communicate()


def run(processes: int, *argv: str, code: int = 0, clipped: bool = False) -> tuple[list[str], str]:
    """(lines of stdout, stderr) of a training that ends with `code`."""
    with torchrun(processes, *argv, clipped=clipped) as process:
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code, err
    return out.splitlines(), err


def children(parent: int) -> list[int]:
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent:
            pids.append(int(path.parent.name))
    return pids


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """The process id of torchrun's worker of that rank."""
    for pid in children(process.pid):
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return pid
    raise AssertionError(f"no worker of rank {rank}")


def alone(*argv: str) -> None:
    """The training in this process."""
    assert distributed.main(argv) == 0


def read(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def tensors(state: Any, name: str = "") -> dict[str, Any]:
    """All tensors in nested dicts, by their path."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    if not isinstance(state, dict):
        return {}
    return {k: v for key, value in state.items() for k, v in tensors(value, f"{name}/{key}").items()}


def history(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Without the seconds, which are the clock's."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in state["progress"]["history"]]


def assert_same_sums(state: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, those of the best epoch, the optimizer's state and the losses agree but for the order of sums."""
    mine, theirs = tensors(state), tensors(other)
    assert list(mine) == list(theirs)
    assert len(mine) == 6 * 5, "six tensors: weights, best weights, Adam's two means and its steps"
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], **SAME_SUMS, msg=lambda m, name=name: f"{name}: {m}")
    assert len(history(state)) == len(history(other))
    for entry, expected in zip(history(state), history(other)):
        assert entry == pytest.approx(expected, rel=1e-11)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For trainings in this process: they set the number of threads and the generator for themselves."""
    threads = torch.get_num_threads()
    for name in ("RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoints of one process, after the first epoch of two and after both, trained in one go."""
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "CLIP_NORM", CLIP_NORM)
        alone(*FLOAT64, "--epochs", "2", "--checkpoint", f"{folder}/both.pt")
        alone(*FLOAT64, "--epochs", "1", "--checkpoint", f"{folder}/first.pt")
    torch.set_num_threads(threads)
    return folder / "first.pt", folder / "both.pt"


# ---- the same sums -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_one_process_trains_as_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patient by patient, by torch.nn: the mean loss over a batch's hours, its gradient clipped, a step of Adam."""
    rate, epochs = 0.2, 4
    monkeypatch.setattr(distributed, "CLIP_NORM", CLIP_NORM)
    alone(*FLOAT64, "--learning-rate", str(rate), "--epochs", str(epochs), "--checkpoint", f"{tmp_path}/loop.pt")
    state = read(tmp_path / "loop.pt")

    records = sepsis.simulate(PATIENTS, 0)
    train, validation, _ = study.parts(records)
    built = features.build(records, train)
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    lstm, head = torch.nn.LSTM(len(built.names), 8, **options), torch.nn.Linear(8, 1, **options)
    model = torch.nn.ModuleDict({"recurrent": lstm, "head": head})
    positive = records.label[records.rows_of(train)].mean()
    torch.nn.init.constant_(head.bias, np.log(positive / (1 - positive)))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)

    def losses(part: Any, index: Any) -> Any:
        """Of every hour of some patients of a part."""
        x, label = built.sequences(part), features.split_rows(records.label, built.offset, part)
        z = torch.cat([head(lstm(torch.from_numpy(x[i]).double())[0])[:, 0] for i in index])
        y = torch.from_numpy(np.concatenate([label[i] for i in index])).double()
        return torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")

    norms: list[float] = []
    after: list[dict[str, Any]] = []
    expected: list[dict[str, float]] = []
    for epoch in range(1, epochs + 1):
        random, total = np.random.default_rng((0, epoch)), 0.0
        for index in training.batches(records.length[train], BATCH_SIZE, random):
            loss = losses(train, index)
            optimizer.zero_grad()
            loss.mean().backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)))
            optimizer.step()
            total += float(loss.detach().sum())
        with torch.no_grad():
            val_loss = float(losses(validation, range(validation.sum())).mean())
        expected.append({"train_loss": total / records.length[train].sum(), "val_loss": val_loss})
        after.append({name: value.clone() for name, value in model.state_dict().items()})
    assert min(norms) < CLIP_NORM < max(norms), "some gradients are clipped"
    best = int(np.argmin([entry["val_loss"] for entry in expected]))
    assert best < epochs - 1, "the last weights are not the best"
    assert len(history(state)) == epochs
    for entry, wanted in zip(history(state), expected):
        assert {name: entry[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    for name in after[-1]:
        torch.testing.assert_close(state["model"][name], after[-1][name], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(state["progress"]["best"][name], after[best][name], rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("in_process")
def test_batches_are_the_same_on_all_ranks_and_masks_each_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, list[int]]] = []

    def step(_: Any, index: Any) -> float:
        steps.append((torch.initial_seed(), index.tolist()))
        return 0.0

    monkeypatch.setattr(distributed.Training, "_step", step)
    for rank, seed in ((0, "0"), (1, "0"), (0, "1")):
        with monkeypatch.context() as patch:
            patch.setattr(distributed.dist, "get_rank", lambda rank=rank: rank)
            alone(*SIZES, "--epochs", "2", "--seed", seed)
    assert len({seed for seed, _ in steps}) == len(steps) == 3 * 2 * 3, "a seed of masks for each run, epoch and batch"
    epochs = [[index for _, index in steps[i : i + 3]] for i in range(0, len(steps), 3)]
    assert epochs[2:4] == epochs[:2], "the same on both ranks"
    assert epochs[0] != epochs[1] and epochs[0] != epochs[4], "others in the next epoch and of another seed"
    for epoch in epochs:
        assert sorted(i for index in epoch for i in index) == list(range(87)), "every patient once"


def test_two_processes_train_as_one_with_the_same_global_batch(one_process: tuple[Path, Path], tmp_path: Path) -> None:
    train = study.parts(sepsis.simulate(PATIENTS, 0))[0]
    assert train.sum() % BATCH_SIZE == 1, "a rank has no patient of the last batch"
    out, _ = run(2, *FLOAT64, "--epochs", "2", "--checkpoint", f"{tmp_path}/two.pt", clipped=True)
    assert "processes: 2" in out[1]
    state = read(tmp_path / "two.pt")
    assert_same_sums(state, read(one_process[1]))
    assert len({entry["train_loss"] for entry in history(state)}) == 2, "it does train"

    # The weights are torch.nn's, by name and by meaning.
    records = sepsis.simulate(PATIENTS, 0)
    test = study.parts(records)[2]
    built = features.build(records, train)
    model = torch.nn.ModuleDict({"recurrent": torch.nn.LSTM(len(built.names), 8), "head": torch.nn.Linear(8, 1)})
    model.double().load_state_dict(state["progress"]["best"])
    with torch.no_grad():
        z = [model["head"](model["recurrent"](torch.from_numpy(x).double())[0]) for x in built.sequences(test)]
    auroc, auprc = study.areas(records.label[records.rows_of(test)], torch.cat(z).numpy()[:, 0])
    assert out[-1].endswith(f"AUROC {auroc:.4f}, AUPRC {auprc:.4f}")


def test_shards_train_as_whole_weights_and_go_on_from_a_checkpoint_of_such(
    one_process: tuple[Path, Path], tmp_path: Path
) -> None:
    first, both = one_process
    path = tmp_path / "sharded.pt"
    shutil.copy(first, path)
    out, _ = run(2, *FLOAT64, "--epochs", "2", "--checkpoint", str(path), "--shard", clipped=True)
    assert "sharded" in out[1] and out[2].startswith("resumed from") and out[3].startswith("epoch 2")
    assert_same_sums(read(path), read(both))


# ---- a training that is stopped goes on --------------------------------------------------------------------


def test_killed_workers_cost_nothing_but_time(tmp_path: Path) -> None:
    """Each rank once, SIGKILL in the middle of an epoch; torchrun starts all anew, and all bits are as if it were not.

    Dropout makes the outcome depend on the state of the generators too.
    """
    argv = [*SIZES, "--batch-size", "2", "--epochs", "4", "--dropout", "0.3", "--checkpoint-every", "3"]
    expected, _ = run(2, *argv, "--checkpoint", f"{tmp_path}/uninterrupted.pt")
    path = tmp_path / "killed.pt"
    with torchrun(2, *argv, "--checkpoint", str(path), restarts=2) as process:
        for rank, epoch in ((1, 1), (0, 2)):
            wait_for(process, lambda epoch=epoch: path.exists() and reached(path, epoch))
            os.kill(worker(process, rank), signal.SIGKILL)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    lines = out.splitlines()
    resumed = [re.search(r"epoch (\d+), (\d+) batches done", line) for line in lines if line.startswith("resumed")]
    assert len(resumed) == 2, f"two restarts, each from the checkpoint: {out}"
    for found in resumed:
        assert found and 0 < int(found[2]) < 44 and int(found[2]) % 3 == 0, "in the middle of an epoch"
    assert lines[-1] == expected[-1]

    state, uninterrupted = read(path), read(tmp_path / "uninterrupted.pt")
    assert history(state) == history(uninterrupted)
    assert [entry["epoch"] for entry in history(state)] == [1, 2, 3, 4]
    mine, theirs = tensors(state), tensors(uninterrupted)
    assert list(mine) == list(theirs) and len(mine) == 30
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def reached(path: Path, epoch: int) -> bool:
    progress = read(path)["progress"]
    return bool(progress["epoch"] >= epoch and progress["batch"])


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, f"it ended before it was killed: {process.communicate()}"
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.usefixtures("in_process")
def test_a_checkpoint_within_an_epoch_is_all_there_is_to_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint of a training, resumed in a process, ends where that training does, to the bit."""
    argv = [*SIZES, "--epochs", "2", "--dropout", "0.3", "--checkpoint-every", "1"]
    kept: list[Path] = []
    write = distributed.write_whole

    def write_and_keep(path: str, content: bytes) -> None:
        write(path, content)
        kept.append(tmp_path / f"{len(kept)}.pt")
        shutil.copy(path, kept[-1])

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "write_whole", write_and_keep)
        alone(*argv, "--checkpoint", f"{tmp_path}/whole.pt")
    assert len(kept) == 6, "three batches, two epochs"
    whole = read(tmp_path / "whole.pt")
    for path in kept:
        alone(*argv, "--checkpoint", str(path))
        state = read(path)
        assert history(state) == history(whole), path
        for name, value in tensors(whole).items():
            assert torch.equal(tensors(state)[name], value), (path, name)


@pytest.mark.usefixtures("in_process")
def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(
    one_process: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "full.pt"
    shutil.copy(one_process[0], path)
    write = distributed.write_whole

    def write_half(path: str, content: bytes) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
        try:
            write(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(distributed, "write_whole", write_half)
    assert distributed.main([*FLOAT64, "--epochs", "2", "--checkpoint", str(path)]) == 2
    assert "File too large" in capsys.readouterr().err
    assert path.read_bytes() == one_process[0].read_bytes()
    assert os.listdir(tmp_path) == ["full.pt"], "nor is a part of the new one left"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (["--cell", "gru"], "cell gru; got one of cell lstm"),
        (["--hidden-size", "9"], "hidden_size 9; got one of hidden_size 8"),
        (["--batch-size", "44"], "batch_size 44; got one of batch_size 43"),
        (["--learning-rate", "0.1"], "learning_rate 0.1; got one of learning_rate 0.006"),
        (["--dropout", "0.5"], "dropout 0.5; got one of dropout 0.0"),
        (["--dtype", "float32"], "dtype float32; got one of dtype float64"),
        (["--seed", "1"], "seed 1, data [0-9a-f]*; got one of seed 0, data [0-9a-f]*"),
        (["--patients", "121"], "data [0-9a-f]*; got one of data [0-9a-f]*"),
        (["--epochs", "1"], "--epochs: expected at least 2, .*; got 1"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_training_is_refused(
    one_process: tuple[Path, Path], capsys: pytest.CaptureFixture[str], other: list[str], sentence: str
) -> None:
    before = one_process[1].read_bytes()
    argv = [*FLOAT64, "--epochs", "2", "--checkpoint", str(one_process[1]), *other]
    assert distributed.main(argv) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert one_process[1].read_bytes() == before


def test_all_processes_end_when_a_checkpoint_is_refused(one_process: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    shutil.copy(one_process[0], path)
    out, err = run(2, *FLOAT64, "--cell", "gru", "--checkpoint", str(path), code=1)
    assert f"{path}: expected a checkpoint of cell gru; got one of cell lstm" in err
    assert len(out) == 2, "nothing was trained"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half"])
def test_a_file_that_is_no_checkpoint_is_refused(
    one_process: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | str
) -> None:
    path = tmp_path / "other.pt"
    whole = one_process[0].read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    assert distributed.main([*FLOAT64, "--checkpoint", str(path)]) == 2
    assert f"{path}: expected a checkpoint of this training, or no file; got" in capsys.readouterr().err


# ---- threads and arguments ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("cores", "environment", "threads"),
    [
        (8, {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 4),  # as torchrun sets it
        (7, {"LOCAL_WORLD_SIZE": "2"}, 3),
        (2, {"LOCAL_WORLD_SIZE": "3"}, 1),
        (5, {}, 5),
        (8, {"LOCAL_WORLD_SIZE": "2", "GATEWISE_NUM_THREADS": "3"}, 3),
    ],
)
def test_cores_are_divided_among_the_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cores: int,
    environment: dict[str, str],
    threads: int,
) -> None:
    for name in ("GATEWISE_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "available_cores", lambda: cores)
    alone(*SIZES, "--epochs", "1")
    assert f"threads of each: {threads}\n" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--batch-size", "0"], "--batch-size: expected an integer, 1 or more; got 0"),
        (["--hidden-size", "x"], "--hidden-size: expected an integer, 1 or more; got x"),
        (["--epochs", "1.5"], "--epochs: expected an integer, 1 or more; got 1.5"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number above 0; got nan"),
        (["--dropout", "1"], "--dropout: expected a number in 0 <= p < 1; got 1"),
        (["--seed", "-1"], "--seed: expected an integer, 0 or more; got -1"),
        (["--cell", "cnn"], "--cell: invalid choice: 'cnn'"),
        (["--data", "there", "--patients", "200"], "--patients: expected with the simulated cohort only"),
        (["--data", "/nowhere"], "/nowhere: expected a directory"),
        (["--patients", "99"], "patients: expected at least 100; got 99"),
        (["--checkpoint", "/nowhere/file.pt"], "--checkpoint: expected a file in a folder that exists"),
        (["--checkpoint", "/"], "--checkpoint: expected a file"),
    ],
)
def test_a_mistake_is_named(capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str) -> None:
    try:
        code: object = distributed.main(argv)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
def test_a_loss_that_is_no_number_ends_the_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = [*SIZES, "--learning-rate", "1e37", "--checkpoint", f"{tmp_path}/lost.pt", "--checkpoint-every", "1"]
    assert distributed.main(argv) == 2
    assert re.search(r"the .* became (nan|inf) in epoch 1; try a learning rate below 1e\+37", capsys.readouterr().err)
