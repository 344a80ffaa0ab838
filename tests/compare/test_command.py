"""The command, end to end on a tiny comparison: exit codes, files, pictures, messages."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from compare_helpers import TINY, policy_file, records, text_file

from selective.cli import main
from selective.compare import build, memory, summarise
from selective.compare.config import merge
from selective.compare.plots import write_plots
from selective.compare.setup import prepare


def config_file(folder: Path, **changes) -> str:
    path = folder / "mine.json"
    data = merge(merge(TINY, {"data": {"file": str(text_file(folder))}}), changes)
    path.write_text(json.dumps(data))
    return str(path)


def test_from_file_to_table(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["compare", "--config", config_file(tmp_path), "--policy", "MGUP", "--policy", '{"kind": "Cautious"}']
    code = main(
        [*arguments, "--seeds", "2", "--lr", "1e-2", "3e-2", "--controls", "--set", "model.width=12", "--out", str(out)]
    )
    printed = capsys.readouterr().out
    assert code == 0
    results = json.loads((out / "results.json").read_text())
    assert results["schema"] == 1
    assert results["complete"]
    assert results["config"]["model"]["width"] == 12
    assert len(results["runs"]) == 5 * 2 * 2
    assert [c["role"] for c in results["contenders"]] == ["baseline", "policy", "control", "policy", "control"]
    assert {"python", "torch", "processor", "threads", "date", "selective"} <= set(results["environment"])
    for run in results["runs"]:
        assert run["steps_done"] == len(run["train"]["loss"]) == len(run["optimizer_ms"]) == 6
        assert all(math.isfinite(loss) for loss in run["validation"]["loss"])
        assert bool(run["share"]["by_parameter"]) == (run["contender"] != 0)
    mgup = next(run for run in results["runs"] if run["contender"] == 1)
    assert set(mgup["share"]["by_parameter"]["blocks.0.qkv.weight"]) == {0.5}
    assert "MGUP()" in printed
    assert "random control" in printed
    assert "95 %" in printed
    for name in ("loss.png", "share.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert (out / name).stat().st_size > 10_000  # an empty figure has 3 kB
    again = main(["compare", "--resume", "--out", str(out)])  # nothing to do: the table once more, from what is there
    assert again == 0
    assert "MGUP()" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--base", "Adamm"], "no optimizer 'Adamm' (did you mean 'Adam'?)"),
        (["--base", "torch.optim.AdamW"], "did you mean 'torch.optim:AdamW'?"),
        (["--base-options", '{"lr": 1}'], "found 'lr', which is set for every contender and group by lr (--lr)"),
        (["--base-options", '{"weight_decay": 1}'], "loop.weight_decay"),
        (["--base-options", '{"beta": 1}'], "beta=1) refuses"),
        (["--set", "device=tpu"], "device: 'tpu' cannot be used here"),
        (["--import", "no_such_module"], "imports: no_such_module cannot be imported"),
        (["--policy", "magama"], "the command line is not a comparison"),
        (["--set", "model.widht=3"], "model.widht: unknown key"),
        (["--data", "/nowhere/text.txt"], "--data /nowhere/text.txt: cannot be read"),
        (["--config", "/nowhere/mine.yaml"], "cannot be read"),
        (["--resume"], "--out"),
    ],
)
def test_what_cannot_be_done_is_said_with_exit_code_2(tmp_path, capsys, more, says):
    arguments = ["compare", "--config", config_file(tmp_path), *more]
    arguments += [] if "--resume" in more else ["--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more", [["--seeds", "three"], ["--policy", "{"], ["--set", "steps"], ["--resume", "--overwrite"], []]
)
def test_usage_errors(more, capsys):
    with pytest.raises(SystemExit) as left:
        main(["compare", *more] if more else [])
    assert left.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_an_existing_comparison_is_not_overwritten(tmp_path, capsys):
    arguments = ["compare", "--config", config_file(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_resume_begins_where_there_is_nothing_and_a_description(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--resume"]
    assert main(["compare", *out]) == 2  # a mistyped folder
    assert "holds no comparison" in capsys.readouterr().err
    assert main(["compare", "--config", config_file(tmp_path), *out]) == 0
    capsys.readouterr()
    assert main(["compare", "--config", config_file(tmp_path, steps=7), *out]) == 2
    assert "steps: 6 before, 7 now" in capsys.readouterr().err


def test_the_folder_of_the_results_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["compare", "--config", config_file(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_a_policy_of_ones_own(tmp_path, capsys, monkeypatch):
    """Processes have to find the class, too: test_resume.py, `test_processes_and_one_process_agree`."""
    policy_file(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "out"
    described = ["compare", "--config", config_file(tmp_path), "--out", str(out)]
    assert main([*described, "--import", "my_policies", "--policy", '{"kind": "HalfOfIt", "rest": 0.2}']) == 0
    assert "HalfOfIt(rest=0.2)" in capsys.readouterr().out
    assert main(["compare", "--out", str(out), "--resume"]) == 0


def test_the_summary_is_written_too(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--policy", "Cautious", "--seeds", "2", "--out", str(out)]
    assert main(["compare", "--config", config_file(tmp_path), *arguments]) == 0
    results = json.loads((out / "results.json").read_text())
    finals = {(r["contender"], r["seed"]): r["validation"]["loss"][-1] for r in results["runs"]}
    rows = {row["contender"]: row for row in results["summary"]["rows"]}
    assert results["summary"]["seeds"] == [0, 1]
    for contender in (0, 1):
        assert rows[contender]["loss"]["mean"] == pytest.approx((finals[contender, 0] + finals[contender, 1]) / 2)
    difference = [finals[1, seed] - finals[0, seed] for seed in (0, 1)]
    assert rows[1]["difference"]["mean"] == pytest.approx(sum(difference) / 2)
    (verdict,) = results["summary"]["verdicts"]
    assert verdict["says"] in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")


def test_a_comparison_of_the_base_with_itself_says_so(tmp_path, capsys):
    assert main(["compare", "--config", config_file(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "No policy to compare it with" in capsys.readouterr().out


def test_explain_and_version(capsys):
    assert main(["explain", "--base", "SGD", "--policy", "Cautious"]) == 0
    assert "Cautious()" in capsys.readouterr().out
    assert main(["explain", "--base", "RMSprop", "--policy", "AlphaConsistency"]) == 2
    assert "momentum" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("selective ")


def test_starting_up_imports_nothing_heavy():
    """`selective --help` answers at once: cli.py itself needs the standard library only."""
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('cli', sys.argv[1]); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); m._parser(); print([n for n in ('torch', 'rich', 'matplotlib') if n in sys.modules])"
    )
    path = Path(__file__).parents[2] / "selective" / "cli.py"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bytes_are_those_of_the_state(tmp_path):
    """Adam keeps two float32 moments and a step count for each parameter."""
    config = build(merge(TINY, {"policies": ["MGUP", "Cautious"], "model": {"width": 64}}))
    base, mgup, cautious = memory.measure(prepare(config))
    from selective.compare.model import GPT

    swapped = build(merge(TINY, {"policies": ["Cautious", "MGUP"], "model": {"width": 64}}))
    assert memory.measure(prepare(swapped)) == [base, cautious, mgup]  # whoever comes first pays for itself only
    parameters = list(GPT(config.model, 0).parameters())
    assert base["state_bytes"] == sum(8 * p.numel() + 4 for p in parameters)
    assert base["extra_state_bytes"] == base["extra_step_bytes"] == 0
    assert base["peak_bytes"] >= base["state_bytes"]
    for found in (mgup, cautious):
        assert found["extra_state_bytes"] == found["state_bytes"] - base["state_bytes"]
        assert found["extra_state_bytes"] < base["state_bytes"]  # no copy of the parameters is kept


def test_pictures_of_one_seed_and_of_a_diverged_contender(tmp_path):
    config = build({"policies": ["MGUP"], "lr": [1.0], "controls": False, "seeds": 1, "steps": 100})
    made = records(config, {(0, 1.0): [2.0], (1, 1.0): [None]})
    assert [path.name for path in write_plots(config, summarise(config, made), made, tmp_path)] == ["loss.png"]
    assert write_plots(config, summarise(config, made[:1]), made[:1], tmp_path) == []
