"""The command line: what it prints, what it returns, and that a user's mistake is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import gatewise as gw
from gatewise import check, cli, functional


def run(capsys, *argv):
    """Exit code, stdout, stderr of `gatewise ...` within this process."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def spawn(*argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", "gatewise", *argv],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=60, check=False,
    )  # fmt: skip


def one_sentence(err):
    """A user's mistake: one line that begins with the command's name, no traceback."""
    assert err.startswith("gatewise ") and err.count("\n") == 1 and "Traceback" not in err
    return err


# ---- info --------------------------------------------------------------------------------------------------


def test_info(capsys):
    code, out, err = run(capsys, "info")
    assert code == 0 and err == ""
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line and not line.startswith(" "))
    assert lines["gatewise"] == gw.__version__
    assert lines["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert lines["cells"].split(", ") == [*gw.cells()]
    for arch in check.running_archs():
        assert arch in out
    for name, reason in gw.backends().items():
        assert f"{name}" in out and str(reason) in out
    for package in cli.EXTRAS:
        assert package in lines


def test_info_says_what_runs_and_where_the_threads_come_from(capsys, monkeypatch):
    monkeypatch.setenv("GATEWISE_NUM_THREADS", "3")
    assert "3 (GATEWISE_NUM_THREADS)" in run(capsys, "info")[1]
    monkeypatch.setenv("GATEWISE_ARCH", "generic")
    assert "generic (GATEWISE_ARCH)" in run(capsys, "info")[1]
    monkeypatch.setenv("GATEWISE_BACKEND", "cpu")
    assert "cpu (GATEWISE_BACKEND)" in run(capsys, "info")[1]


@pytest.mark.parametrize("variable", ["GATEWISE_NUM_THREADS", "GATEWISE_ARCH", "GATEWISE_BACKEND"])
def test_info_survives_an_environment_that_it_has_to_report(capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "garbage")
    code, out, err = run(capsys, "info")
    assert code == 2
    assert variable in one_sentence(err) and "garbage" in err
    assert gw.__version__ in out  # what was known before


def test_info_names_the_extra_of_what_is_missing(capsys, monkeypatch):
    def missing(name):
        if name == "numba":
            raise cli.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(cli.metadata, "version", missing)
    assert 'not installed: pip install "gatewise[reference]"' in run(capsys, "info")[1]


def test_info_imports_nothing_heavy():
    """Not Numba, not torch, not scikit-learn: to be asked what is there must not load it."""
    code = """if True:
        import sys
        from gatewise import cli
        cli.main(["info"])
        print(sorted({"numba", "llvmlite", "torch", "sklearn", "scipy", "matplotlib"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_gatewise():
    done = spawn("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gatewise {gw.__version__}\n", "")


# ---- check -------------------------------------------------------------------------------------------------


def test_check_prints_the_matrix_and_a_summary(capsys):
    code, out, err = run(capsys, "check", "--quick", "--cell", "gru", "--backend", "cpu")
    assert code == 0 and err == ""
    lines = out.splitlines()
    archs = check.running_archs()
    for arch in archs:
        for dtype in ("float32", "float64"):
            for option in check.QUICK:
                (line,) = (line for line in lines if f"cpu[{arch}]" in line and dtype in line and f" {option} " in line)
                assert line.startswith("gru ") and line.endswith(" ok")
        for name in ("exp", "tanh", "sigmoid"):
            assert sum(line.startswith(name) and f" {arch} " in line and line.endswith(" ok") for line in lines) == 2
    count = len(archs) * (2 * len(check.QUICK) + 6)
    assert lines[-1].startswith(f"{count} of {count} ")


def test_check_exits_with_1_on_a_miss(capsys, monkeypatch):
    original = functional.backward

    def wrong(tape, *args, **kwargs):
        grads = original(tape, *args, **kwargs)
        if tape.backend == "cpu":
            grads.dw_hh[0, 0] += 1
        return grads

    monkeypatch.setattr(functional, "backward", wrong)
    code, out, _ = run(capsys, "check", "--quick", "--cell", "rnn_tanh", "--backend", "cpu")
    assert code == 1
    assert " MISS" in out and "dw_hh: " in out
    assert not out.splitlines()[-1].startswith(f"{len(check.running_archs())} of")


def test_check_as_json(capsys):
    code, out, _ = run(capsys, "check", "--quick", "--cell", "rnn_relu", "--backend", "cpu", "--json")
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert code == 0 and document["ok"] is True
    assert document["gatewise"] == gw.__version__
    rows = document["matrix"]
    assert {row["cell"] for row in rows} == {"rnn_relu"}
    assert {row["backend"] for row in rows} == {f"cpu[{arch}]" for arch in check.running_archs()}
    for row in rows:
        assert row["ok"] is True and 0 <= row["share"] <= 1
        assert (row["differences"] is None) == (row["dtype"] == "float32")
    assert {row["function"] for row in document["functions"]} == {"exp", "tanh", "sigmoid"}


@pytest.mark.parametrize("flag, known", [("--cell", "lstm"), ("--backend", "cpu")])
def test_check_of_something_unknown_lists_the_known(capsys, flag, known):
    code, out, err = run(capsys, "check", flag, "lsmt")
    assert code == 2 and out == ""
    assert known in one_sentence(err) and "lsmt" in err


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "gatewise", "check", "--quick", "--cell", "gru", "--backend", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


# ---- demo, mistakes, Ctrl-C --------------------------------------------------------------------------------


@pytest.fixture
def demo(monkeypatch):
    """What the command passes on."""
    sepsis = pytest.importorskip("gatewise.sepsis")
    calls = []
    monkeypatch.setattr(sepsis, "demo", lambda **options: calls.append(options))
    return calls


def test_demo_passes_on_what_was_given_and_nothing_else(capsys, demo):
    assert run(capsys, "demo")[0] == 0
    assert run(capsys, "demo", "--data", "records", "--report", "out", "--seed", "3", "--epochs", "4",
               "--hidden-size", "5", "--patients", "6", "--seeds", "7")[0] == 0  # fmt: skip
    assert demo == [
        {},
        {"data": "records", "report": "out", "seed": 3, "seeds": 7, "epochs": 4, "hidden_size": 5, "patients": 6},
    ]


def test_demo_on_a_folder_that_is_not_there(capsys, tmp_path):
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib"), pytest.importorskip("tqdm")
    code, _, err = run(capsys, "demo", "--data", str(tmp_path / "nowhere"), "--report", str(tmp_path / "report"))
    assert code == 2 and "nowhere" in one_sentence(err)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["check", "--frobnicate"], ["demo", "--epochs", "many"]])
def test_a_command_that_does_not_exist(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.startswith("usage: gatewise")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "error, code",
    [
        (FileNotFoundError("records: no such folder"), 2),
        (ValueError("data: expected a folder"), 2),
        (ImportError('the demo needs tqdm: pip install "gatewise[demo]"'), 2),
        (MemoryError("y: 9 TB do not fit"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_mistakes_are_sentences_and_ctrl_c_is_130(capsys, monkeypatch, error, code):
    sepsis = pytest.importorskip("gatewise.sepsis")

    def fail(**options):
        raise error

    monkeypatch.setattr(sepsis, "demo", fail)
    got, _, err = run(capsys, "demo")
    assert got == code
    if code == 2:
        assert str(error) in one_sentence(err)


def test_a_fault_of_ours_is_no_sentence(capsys, monkeypatch):
    """What is not the user's mistake keeps its traceback."""
    sepsis = pytest.importorskip("gatewise.sepsis")
    monkeypatch.setattr(sepsis, "demo", lambda **options: [][0])
    with pytest.raises(IndexError):
        cli.main(["demo"])
