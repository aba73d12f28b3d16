"""What a machine has, and what is said of what it lacks."""

import re
from pathlib import Path

import pytest

import algorithms
import datasets
from bench import doctor
from bench.doctor import Finding


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("numpy>=1", ""),
        ("numpy<0.1", r"numpy is .*, not <0\.1"),
        ("no-such-package>=1", "no-such-package is missing"),
        ("no-such-package; python_version < '3'", ""),
    ],
)
def test_a_package_is_held_against_its_range(asked: str, said: str) -> None:
    found = doctor.lacking(asked)
    assert (found == "") == (said == "")
    assert re.fullmatch(said, found)


def test_every_requirement_of_the_project_is_read() -> None:
    needed, extras = doctor.requirements()
    assert any(text.startswith("torch") for text in needed)
    assert {"gpu", "search", "dev"} <= extras.keys()


def test_a_machine_on_which_the_tests_run_has_no_fault(bench, monkeypatch) -> None:
    monkeypatch.setattr(algorithms, "names", lambda: ["maml", "protonet"])
    status, out, err = bench("doctor", "--data-root", "nowhere")
    assert (status, err) == (0, "")
    *lines, total = out.splitlines()
    assert total.startswith("faults: 0, warnings: ")
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    said = {line.split()[1]: line for line in lines}
    assert {"python", "packages", "cpu", "memory", "results", "engines", "products"} <= said.keys()
    assert set(datasets.names()) <= said.keys()
    assert said["glyphs"].startswith("ok")
    assert said["omniglot"].startswith("warning")
    assert "nowhere/omniglot/images_background.zip is missing; --download" in said["omniglot"]
    assert "'datasets' is this project's" in said["datasets"]


def test_it_says_why_the_kernels_cannot_be_compiled(monkeypatch) -> None:
    assert next(doctor.tools()).level == "ok"
    monkeypatch.setenv("CC", "no-such-compiler")
    found = next(doctor.tools())
    assert (found.about, found.level) == ("kernels", "warning")
    assert "there is no C compiler" in found.line


def test_a_fault_is_exit_status_1(bench, monkeypatch) -> None:
    fault = Finding("python", "fault", "Python 2", "3.10 or newer is needed")
    monkeypatch.setattr(doctor, "examine", lambda root: iter([fault]))
    status, out, _ = bench("doctor")
    assert status == 1
    assert out.splitlines()[0].split() == [
        *("fault", "python", "Python", "2;"),
        *("3.10", "or", "newer", "is", "needed"),
    ]


def test_engines_that_disagree_are_a_fault(monkeypatch) -> None:
    monkeypatch.setattr(algorithms, "names", lambda: ["maml", "fomaml"])
    monkeypatch.setattr(doctor, "verify", lambda name, *rest: {"maml": 1e-3, "fomaml": 0.0}[name])
    (found,) = doctor.engines()
    assert found.level == "fault"
    assert found.found == "maml: the batched gradient is 1.0e-03 from that by higher"


def test_missing_packages_broken_built_in_data_and_a_read_only_folder_are_faults(
    monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: (["numpy<0.1"], {}))
    assert [found.level for found in doctor.packages()] == ["fault"]

    class Broken(datasets.Dataset):
        def load(self, split: str) -> datasets.Source:
            raise datasets.DatasetError("cut short")

    monkeypatch.setattr(datasets, "names", lambda: ["glyphs", "omniglot"])
    monkeypatch.setattr(datasets, "get", lambda name: Broken)
    levels = [found.level for found in doctor.data(tmp_path)]
    assert levels == ["ok", "fault", "warning"]

    def unreadable(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Broken, "load", unreadable)
    levels = [found.level for found in doctor.data(tmp_path)]
    assert levels == ["ok", "fault", "warning"]

    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert [found.level for found in doctor.disks()] == ["fault", "warning"]
