"""The grid of examples/paper: names, what is run again and what is not, signals, and keys that pretrain knows."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from examples.paper import package
from examples.paper.e13_placement import NO_EMBEDDING
from examples.paper.experiment import Experiment, Results
from examples.paper.grid import Arm, Grid, Run, make_run, nested, plan
from examples.paper.setting import Setting, gpu, small
from examples.running.attempts import attempts
from examples.running.children import Interrupted
from megamult.runtime import exit_codes
from megamult.train.command_line import parse
from tests.paper.settings import tiny

ARMS = [Arm("one"), Arm("two", {"multipliers.implementation": "none"})]


def quiet(text: str) -> None:
    """Say nothing."""


def _names(value: object) -> list[str]:
    """Keys, those of mappings in values too, and values that are words."""
    if isinstance(value, Mapping):
        return [name for key, inner in value.items() for name in (key, *_names(inner))]
    return [value] if isinstance(value, str) else []


def scripted(folder: Path, script: str) -> Grid:
    """A grid whose runs are a bash script, which sees the run's name as $NAME; their starts are in `calls`."""

    def command(run: Run, _: Path) -> list[str]:
        return ["bash", "-c", f"NAME={run.name}; echo $NAME >>{folder}/calls; {script}"]

    return Grid(folder, command, quiet)


def calls(grid: Grid) -> list[str]:
    """Names of the runs that were started, in order; forgets them."""
    file = grid.folder / "calls"
    names = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return names


def test_a_runs_name_depends_on_its_configuration_and_on_nothing_else() -> None:
    setting = tiny()
    names = {
        make_run(setting, arm, 1).name
        for arm in (
            Arm("usual"),
            Arm("another name", {"optimizer.name": "adamw"}),
            Arm("the same decay", {"optimizer.weight_decay": 0.8}),
        )
    }
    assert len(names) == 1
    others = [
        make_run(setting, Arm("usual"), 2),
        make_run(setting, Arm("usual", {"optimizer.weight_decay": 0.4}), 1),
        make_run(setting, Arm("usual", {"optimizer.name": "muon"}), 1),
        make_run(tiny("data/other"), Arm("usual"), 1),
    ]
    assert len(names | {run.name for run in others}) == 5
    assert make_run(setting, NO_EMBEDDING, 1).name.isascii() and "/" not in make_run(setting, NO_EMBEDDING, 1).name


def test_a_plan_has_each_configuration_once_seed_by_seed() -> None:
    runs = plan(tiny(), [*ARMS, Arm("one again", {"optimizer.name": "adamw"})], [1, 2])
    assert [(run.arm, run.seed) for run in runs] == [("one", 1), ("two", 1), ("one", 2), ("two", 2)]


def test_two_runs_are_side_by_side(tmp_path: Path) -> None:
    # Each waits for the other; one after the other, the first would give up.
    grid = scripted(
        tmp_path,
        f"touch {tmp_path}/$NAME.here; for _ in {{1..400}}; do"
        f" (($(ls {tmp_path}/*.here | wc -l) == 2)) && exit 0; sleep 0.05; done; exit 9",
    )
    runs = plan(tiny(), ARMS, [1])
    assert grid.train(runs, workers=2) == []
    assert [grid.state(run) for run in runs] == ["complete", "complete"]


def test_complete_runs_are_not_repeated_and_a_failed_one_stops_no_other(tmp_path: Path) -> None:
    runs = plan(tiny(), ARMS, [1, 2])
    grid = scripted(tmp_path, f"echo a word; test $NAME != {runs[1].name} || test -e {tmp_path}/healed || exit 3")
    (failure,) = grid.train(runs, workers=1)
    assert failure.run == runs[1] and failure.exit_code == 3
    assert "two, seed 1 ended with exit code 3" in str(failure) and str(failure).endswith("a word")
    assert calls(grid) == [run.name for run in runs]
    assert [grid.state(run) for run in runs] == ["complete", "failed", "complete", "complete"]
    (tmp_path / "healed").touch()
    assert grid.train(runs, workers=1) == []
    assert calls(grid) == [runs[1].name]
    assert grid.train(runs) == [] and calls(grid) == []


def test_runs_that_others_decide_are_trained_after_them_by_the_same_call(tmp_path: Path) -> None:
    """The best of three learning rates by the first seed gets all seeds. The second has the lowest loss, the third
    diverges; what the first has with the second seed would be lower still, and is not run."""
    setting = tiny()
    arms = {rate: Arm(f"lr {rate}", {"optimizer.lr": rate}) for rate in (1, 2, 3)}
    losses = {1: 5.0, 2: 4.0, 3: None}

    def decided(results: Results) -> list[Arm]:
        return [min(arms.values(), key=results.first_loss)]

    experiment = Experiment(
        "E0", "", [], lambda setting: list(arms.values()), lambda results, file: None, decided=decided, seeds=1
    )

    def command(run: Run, folder: Path) -> list[str]:
        with (folder / "calls").open("a") as file:
            file.write(f"{run.name}\n")
        (folder / run.name).mkdir()
        loss = losses[int(run.configuration["optimizer.lr"])]
        records = [{"step": 1, "loss": loss}, {"step": 1, "valid_loss": loss}]
        (folder / run.name / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        return ["true"] if loss is not None else ["bash", "-c", f"exit {exit_codes.DIVERGED}"]

    grid = Grid(tmp_path, command, quiet)
    read = Results(setting, grid, (1, 2, 3))
    first, later = plan(setting, arms.values(), [1]), plan(setting, [arms[2]], [2, 3])
    assert package.chosen_runs(read, [experiment]) == first
    assert package.train(read, [experiment], named=False, full=False, workers=1) == []
    assert calls(grid) == [run.name for run in [*first, *later]]
    assert package.chosen_runs(read, [experiment]) == [*first, *later]
    assert grid.state(first[2]) == "diverged" and read.first_loss(arms[3]) == math.inf
    # The same command again starts nothing, not even what diverged.
    assert package.train(read, [experiment], named=False, full=False, workers=1) == [] and calls(grid) == []
    # With `--full` all arms have all seeds.
    assert {(run.arm, run.seed) for run in package.chosen_runs(read, [experiment], full=True)} == {
        (arm.name, seed) for arm in arms.values() for seed in (1, 2, 3)
    }


def test_a_run_that_saved_and_stopped_goes_on_at_the_next_call(tmp_path: Path) -> None:
    runs = plan(tiny(), ARMS, [1])
    grid = scripted(tmp_path, f"test $NAME != {runs[0].name} || test -e {tmp_path}/later || exit 75")
    with pytest.raises(Interrupted):
        grid.train(runs, workers=1)
    assert [grid.state(run) for run in runs] == ["interrupted", "complete"]
    (tmp_path / "later").touch()
    assert grid.train(runs, workers=1) == []
    assert calls(grid) == [runs[0].name, runs[1].name, runs[0].name]


def test_a_signal_ends_the_runs_in_progress_after_they_have_saved_and_starts_no_other(tmp_path: Path) -> None:
    runs = plan(tiny(), ARMS, [1, 2])
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it from the start
    trap = f"trap 'touch {tmp_path}/$NAME.saved; exit 75' TERM; touch {tmp_path}/$NAME.here"
    grid = scripted(tmp_path, f"{trap}; for _ in {{1..600}}; do sleep 0.05; done")

    def interrupt() -> None:
        while len(list(tmp_path.glob("*.here"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted):
        grid.train(runs, workers=2)
    assert sorted(file.stem for file in tmp_path.glob("*.saved")) == sorted(run.name for run in runs[:2])
    assert [grid.state(run) for run in runs] == ["interrupted"] * 2 + ["not started"] * 2
    assert [attempt.exit_code for attempt in attempts(grid.directory(runs[0]))] == [75]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_changed_configuration_is_refused(tmp_path: Path) -> None:
    (run,) = plan(tiny(), ARMS[:1], [1])
    grid = scripted(tmp_path, "true")
    grid.claim(run)
    grid.claim(run)
    (tmp_path / f"{run.name}.yaml").write_text("train: {steps: 7}\n")
    with pytest.raises(ValueError, match="somebody has changed it"):
        grid.train([run])
    assert calls(grid) == []


def test_progress_says_how_many_runs_are_done_and_how_each_ended(tmp_path: Path) -> None:
    runs, said = plan(tiny(), ARMS, [1]), []
    grid = Grid(tmp_path, lambda run, _: ["bash", "-c", "exit 3" if run.arm == "two" else "true"], said.append)
    grid.train(runs, workers=1)
    finished = [line for line in said if line.startswith("[")]
    assert finished[0].startswith("[1/2] one, seed 1: complete after ") and finished[0].endswith(" left")
    assert finished[1].startswith("[2/2] two, seed 1: FAILED with exit code 3 after ")


@pytest.mark.parametrize("setting", [small(), gpu("data/big")], ids=lambda setting: setting.name)
def test_pretrain_knows_every_key_of_every_experiment(tmp_path: Path, setting: Setting) -> None:
    grid = Grid(tmp_path, say=quiet)
    runs = package.chosen_runs(Results(setting, grid, [1]), package.EXPERIMENTS, full=True)
    # One run of each set of keys: others differ from it in numbers only.
    for run in {tuple(_names(run.configuration)): run for run in runs}.values():
        grid.claim(run)
        config, _ = parse(["--config", str(tmp_path / f"{run.name}.yaml"), "--train.run_dir", str(tmp_path)])
        asked = nested(run.configuration)
        assert config.optimizer.name == asked["optimizer"]["name"]
        assert config.optimizer.lr == asked["optimizer"]["lr"] == 8 * config.optimizer.min_lr
        assert config.multipliers.placement == asked["multipliers"]["placement"]
        assert config.train.steps == asked["train"]["steps"]
        keep, save = config.checkpoint.keep_every, config.checkpoint.save_every
        assert keep % save == 0
        # Checkpoints are kept at the end of the constant stage, where E5 and E14 read them, unless an arm has another
        # length and says itself which it needs, or keeps none because it is read from logs.
        assert config.train.steps != setting.steps or keep == 0 or setting.constant_end % keep == 0


def test_the_package_shares_runs_between_experiments(tmp_path: Path) -> None:
    read, experiments = Results(small(), Grid(tmp_path), [1, 2, 3]), package.EXPERIMENTS
    runs = package.chosen_runs(read, experiments)
    # None and all by two optimizers, and three placements beside all, with three seeds; three kinds of final norm at
    # three S and MLPs with and without scalars at two S, with two seeds.
    assert len(runs) == (2 * 2 + 3) * 3 + (3 * 3 + 2 * 2) * 2
    only = package.chosen_runs(read, package.chosen_experiments(["e5"]), named=True)
    assert len(only) == 2 * 3 and {run.name for run in only} < {run.name for run in runs}
    full = package.chosen_runs(read, experiments, full=True)
    # A faster symmetry_free, rows of the head and shared columns, and none at another decay (E5); a third seed of E1
    # and E3; two more S of E1; three more S of E3, and all of Muon's.
    # And all with log, and a multiplier of the head at S = 1/8, direct and log (E15); seven more learning rates of
    # multipliers by two optimizers; five kinds of scales at four learning rates by two optimizers, of which none and
    # all at the setting's are there; four planted ratios and four drifts (E6), three decays of multipliers (E7), two
    # norms at two s (E9); three kinds at four widths, of which two are the same at the base width (E8); by
    # two optimizers, one probe as it is, and four factors of ten things (E10);
    # four kinds at five learning rates and three widths by two optimizers, of which two are the same at the base width;
    # a hybrid without and with multipliers by two optimizers.
    outside = (
        3 + 7 * 2 + (5 * 4 - 2) * 2 + (4 + 4) + 3 + 2 * 2 + (3 * 4 - 1) + 2 * (1 + 4 * 10) + (4 * 3 - 1) * 5 * 2 + 2 * 2
    )
    assert len(full) == (2 * 2 + 3) * 3 + 4 * 3 + 3 * 5 * 3 + 2 * 5 * 2 * 3 + outside * 3


def test_list_numbers_the_runs_and_a_number_out_of_range_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ["--output", str(tmp_path)]
    assert package.main([*output, "--list", "--only", "E13", "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [[str(n), "not", "started"] for n in range(1, 5)]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert package.main([*output, "--only", "E13", "--seeds", "1"]) == 2
    assert "--list shows runs 1 to 4" in capsys.readouterr().err


def test_a_slurm_task_trains_its_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def note(self: Grid, runs: list[Run], workers: int) -> list[object]:
        trained.extend(run.label for run in runs)
        return []

    monkeypatch.setattr(Grid, "train", note)
    monkeypatch.setattr(package, "prepare", lambda setting: None)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert package.main(["--output", str(tmp_path), "--only", "E13", "--seeds", "1"]) == 0
    assert trained == ["adamw, symmetry_free, seed 1"]
    assert not list(tmp_path.rglob("report*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "E99"], "'E99' is unknown: use headline, E2"),
        (["--gpu"], "needs a CUDA GPU"),
        (["--corpus", "nowhere/x"], "nowhere/x_train.bin does not exist"),
    ],
)
def test_mistakes_are_told_with_their_remedy(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert package.main([*arguments, "--output", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_configuration_file_has_sections() -> None:
    run = make_run(tiny(), NO_EMBEDDING, 3)
    tree = yaml.safe_load(yaml.safe_dump(nested(run.configuration)))
    assert tree["train"]["seed"] == 3 and tree["multipliers"]["placement"]["q"] == ["row", "col"]
    assert "embedding" not in tree["multipliers"]["placement"]
