"""From what was asked to cells."""

from pathlib import Path

import pytest
import tomli_w

import algorithms
import datasets
from bench.errors import BenchError
from bench.naming import names
from bench.sweep import Cell, Sweep, read_sweep, stream_seed, tomllib


def cells(**asked):
    return read_sweep(None, {"devices": "cpu"} | asked).cells()


def test_the_grid_has_a_cell_for_every_combination() -> None:
    found = cells(algos="maml,fomaml", shots="1,5", seeds="0,1,2")
    assert len({cell.id for cell in found}) == 12
    assert {(c.algorithm, c.shots, c.seed) for c in found} == {
        (a, k, s) for a in ("maml", "fomaml") for k in (1, 5) for s in (0, 1, 2)
    }


def test_cells_that_are_compared_stand_side_by_side() -> None:
    found = cells(algos="maml,fomaml,anil", shots="1,5")
    assert [c.algorithm for c in found[:3]] == ["maml", "fomaml", "anil"]
    assert len({c.setting for c in found[:3]}) == 1


def test_command_line_comes_before_the_file_and_the_file_before_the_algorithms_defaults(
    tmp_path: Path,
) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text("algos = ['reptile']\ninner_lr = 0.5\niterations = 7\ndevices = ['cpu']\n")
    (cell,) = read_sweep(file, {"iterations": "9"}).cells()
    assert cell.iterations == 9
    assert cell.hyperparameters["inner_lr"] == 0.5
    assert cell.meta_optimizer == "sgd"  # Reptile's own


def test_an_algorithms_defaults_depend_on_the_dataset() -> None:
    (sinusoid,), (glyphs,) = cells(algos="maml", datasets="sinusoid"), cells(algos="maml")
    assert sinusoid.hyperparameters["inner_lr"] == 0.01
    assert glyphs.hyperparameters["inner_lr"] != 0.01


def test_a_cells_id_changes_with_every_setting_and_with_nothing_else(cell) -> None:
    changed = [
        cell.model_copy(update={"seed": 1}),
        cell.model_copy(update={"meta_lr": 0.002}),
        cell.model_copy(update={"hyperparameters": cell.hyperparameters | {"inner_lr": 0.3}}),
    ]
    assert len({cell.id, *(c.id for c in changed)}) == 4
    assert cell.model_copy().id == cell.id


def test_training_shots_are_the_evaluations_unless_they_differ() -> None:
    (maml,), (reptile,) = cells(algos="maml", shots="5"), cells(algos="reptile", shots="5")
    assert maml.train_shots == 5
    assert reptile.train_shots == 10
    assert cells(algos="reptile", train_shots="15")[0].train_shots == 15


def test_gradients_of_a_meta_step_are_counted_as_each_algorithm_takes_them() -> None:
    names = "maml,protonet,nearest,scratch,imaml,finetune,reptile"
    found = {c.algorithm: c.gradients_per_step for c in cells(algos=names, inner_steps="3")}
    expected = {"maml": 16, "protonet": 4, "nearest": 0, "scratch": 12, "imaml": 40, "finetune": 8}
    expected["reptile"] = 12  # the query set only scores
    assert found == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"algos": "mamml"}, "no algorithm is called 'mamml'; did you mean 'maml'"),
        ({"datasets": "glyph"}, "no dataset is called 'glyph'; did you mean 'glyphs'"),
        ({"shots": "0"}, "shots: input should be greater than or equal to 1"),
        ({"shots": "one"}, "shots: 'one' is not an integer"),
        ({"shots": ""}, "shots"),
        ({"seeds": "-1"}, "seeds: input should be greater than or equal to 0"),
        ({"meta_lr": "-1"}, "meta-lr"),
        ({"meta_lr": "nan"}, "meta-lr"),
        ({"iterations": "many"}, "iterations"),
        ({"hyperparameters": {"iner_lr": 1}}, "did you mean 'inner_lr'"),
        (
            {"set": ["iner_lr=0.1,0.2"]},
            "there is no setting 'iner_lr' of .*did you mean 'inner_lr'",
        ),
        ({"set": ["inner_lr=0.1,fast"]}, r"inner-lr: input should be a valid number.*'fast'"),
        ({"set": ["inner_steps=1,2.5"]}, r"inner-steps: input should be a valid integer.*2.5"),
        ({"set": ["iterations=5,0"]}, "iterations: input should be greater than or equal to 1"),
        ({"set": ["inner_lr"]}, "'inner_lr' is not NAME=VALUE"),
        ({"set": ["inner_lr="]}, "inner-lr: list should have at least 1 item"),
        ({"set": ["inner_lr=1", "inner-lr=2"]}, "inner_lr is given twice"),
        ({"set": ["inner_lr=1"], "inner_lr": "2"}, "inner_lr is given twice"),
        ({"set": ["shots=1,5"]}, "shots is not for 'set': it stands for itself"),
    ],
)
def test_what_cannot_be_is_named(asked: dict, message: str) -> None:
    with pytest.raises((BenchError, algorithms.AlgorithmError, ValueError), match=message):
        cells(**asked)


def test_an_unknown_key_in_a_file_is_answered_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text("shot = [1]\n")
    with pytest.raises(BenchError, match="no setting 'shot'; did you mean 'shots'"):
        read_sweep(file, {})


def test_any_setting_or_hyperparameter_is_an_axis() -> None:
    found = cells(algos="maml,fomaml", set=["inner_lr=0.1,0.2", "inner_steps=1,5", "meta_lr=0.01"])
    assert len(found) == 8
    assert {(c.hyperparameters["inner_lr"], c.hyperparameters["inner_steps"]) for c in found} == {
        *((0.1, 1), (0.1, 5), (0.2, 1), (0.2, 5))
    }
    assert {cell.meta_lr for cell in found} == {0.01}
    assert [cell.algorithm for cell in found[:2]] == ["maml", "fomaml"]
    # An option of its own says the same as "set".
    again = cells(algos="maml,fomaml", inner_lr="0.1,0.2", inner_steps="1,5", meta_lr="0.01")
    assert {cell.id for cell in again} == {cell.id for cell in found}


def test_values_are_of_the_settings_type() -> None:
    (cell,) = cells(algos="maml", set=["inner_lr=1", "inner_batch=none", "inner_optimizer=adam"])
    assert repr(cell.hyperparameters["inner_lr"]) == "1.0"
    assert cell.hyperparameters["inner_batch"] is None
    assert cell.id == cells(algos="maml", inner_lr=1.0, set={"inner_optimizer": ["adam"]})[0].id


def test_an_algorithm_without_a_swept_hyperparameter_runs_once_and_that_is_said() -> None:
    @algorithms.register("stubborn")
    class Stubborn(algorithms.get("maml")):
        def __init__(self, model, *, stubbornness: float = 1.0, **settings) -> None:
            super().__init__(model, **settings)

    sweep = read_sweep(None, {"algos": "maml,stubborn", "set": ["stubbornness=1,2,3"]})
    assert [cell.algorithm for cell in sweep.cells()] == ["maml", *["stubborn"] * 3]
    assert sweep.notes() == ["note:  maml has no stubbornness, and runs without"]


def test_the_command_line_comes_before_the_file_however_either_says_it(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text("algos = ['maml']\ninner_steps = 3\n[set]\ninner_lr = [0.1, 0.2]\n")
    assert [c.hyperparameters["inner_lr"] for c in read_sweep(file, {}).cells()] == [0.1, 0.2]
    (cell,) = read_sweep(file, {"inner_lr": "0.5", "set": ["inner_steps=2"]}).cells()
    assert (cell.hyperparameters["inner_lr"], cell.hyperparameters["inner_steps"]) == (0.5, 2)


def test_cells_are_named_by_what_tells_them_apart() -> None:
    found = cells(algos="maml", shots="1,5", set=["inner_lr=0.1,0.2"])
    called = names(found)
    assert len(set(called.values())) == 4
    assert called[found[0].id] == "maml glyphs 5-way 1-shot seed 0 (inner_lr 0.1)"
    assert set(names(cells(algos="maml", shots="1,5")).values()) == {
        f"maml glyphs 5-way {shots}-shot seed 0" for shots in (1, 5)
    }


def test_streams_are_apart() -> None:
    seeds = {stream_seed(p, s) for p in ("initialisation", "training episodes") for s in range(50)}
    assert len(seeds) == 100


def test_a_sweep_written_down_asks_for_the_same_cells() -> None:
    swept = ["inner_batch=none,5", "norm=support,single"]
    asked = {"algos": "maml", "shots": "1,5", "devices": "cpu", "inner_lr": "0.2", "set": swept}
    sweep = read_sweep(None, asked)
    again = Sweep(**tomllib.loads(tomli_w.dumps(sweep.model_dump(mode="json", exclude_none=True))))
    assert [c.id for c in again.cells()] == [c.id for c in sweep.cells()]


def test_samples_of_a_meta_step_are_those_of_its_batch() -> None:
    for dataset, ways in (("glyphs", 5), ("sinusoid", 5)):
        (cell,) = cells(algos="maml", datasets=dataset, ways=ways, shots=2, test_shots=3)
        source = datasets.get(dataset)().load("train")
        batch = source.batch(cell.train_spec(0), range(cell.meta_batch))
        held = sum(targets.shape[:2].numel() for _, targets in (batch["train"], batch["test"]))
        assert cell.samples_per_step == held


def test_gradients_of_a_meta_step_count_the_inner_steps_that_are_taken() -> None:
    maml, pretrained = cells(algos="maml,pretrained", inner_steps=3, meta_batch=10)
    assert maml.gradients_per_step == 40
    assert pretrained.gradients_per_step == 10


def test_a_copy_with_other_settings_has_ids_of_its_own(cell: Cell) -> None:
    first = (cell.id, cell.seedless_id)
    other = cell.model_copy(update={"seed": cell.seed + 1})
    assert other.id != first[0]
    assert other.seedless_id == first[1]
    longer = cell.model_copy(update={"iterations": cell.iterations + 1})
    assert longer.seedless_id != first[1]
    assert (cell.model_copy().id, cell.model_copy().seedless_id) == first


@pytest.mark.parametrize("name", ["pretrained", "finetune", "finetune_pp"])
def test_what_an_algorithm_makes_nothing_of_is_no_axis_of_it(name: str) -> None:
    sweep = Sweep(algos=[name], set={"inner_steps": [1, 5], "inner_lr": [0.1]}, devices=["cpu"])
    (cell,) = sweep.cells()
    assert "inner_steps" not in cell.hyperparameters
    assert cell.hyperparameters["inner_lr"] == 0.1
    assert sweep.notes() == [f"note:  {name} has no inner_steps, and runs without"]


def test_a_regression_has_no_ways_to_sweep() -> None:
    sweep = Sweep(datasets=["glyphs", "sinusoid"], algos=["maml"], ways=[5, 20], devices=["cpu"])
    assert [(cell.dataset, cell.ways) for cell in sweep.cells()] == [
        ("glyphs", 5),
        ("glyphs", 20),
        ("sinusoid", 5),
    ]


def test_all_algorithms_and_seeds_meet_the_same_test_and_validation_episodes() -> None:
    found = cells(algos="maml,reptile", seeds="0,1,2")
    assert len({cell.test_spec.address for cell in found}) == 1
    assert len({cell.val_spec.address for cell in found}) == 1
    (other,) = cells(algos="maml", set=["eval_seed=1"])
    assert other.test_spec.address != found[0].test_spec.address
    assert other.val_spec.address != found[0].val_spec.address
