from __future__ import annotations

import copy
import inspect
import random
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import DatasetError
from datasets.helpers import (
    CIFARFS,
    FC100,
    BatchMetaDataLoader,
    Categorical,
    ClassSplitter,
    MetaDataset,
    MiniImagenet,
    Omniglot,
    Rotation,
    Sinusoid,
    cifar_fs,
    fc100,
    miniimagenet,
    omniglot,
    sinusoid,
)


class ToTensor:
    """As torchvision's: told by its name."""


class ToTensor1D:
    """As pytorch-maml's."""


class Resize:
    """As torchvision's."""

    def __init__(self, size: int) -> None:
        self.size = size


class Compose:
    """As torchvision's."""

    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms


def tiny_omniglot(root: Path, **changes: Any) -> MetaDataset:
    arguments = {"shots": 2, "ways": 3, "meta_train": True, "use_vinyals_split": False, "seed": 0}
    return omniglot(str(root), **(arguments | changes))


def first(dataset: MetaDataset, **options: Any) -> Any:
    return next(iter(BatchMetaDataLoader(dataset, **options)))


def test_a_batch_is_torchmetas(omniglot_root: Path) -> None:
    batch = first(tiny_omniglot(omniglot_root, test_shots=4), batch_size=5)
    assert isinstance(batch, OrderedDict)
    assert list(batch) == ["train", "test"]
    assert all(isinstance(half, list) and len(half) == 2 for half in batch.values())
    assert batch["train"][0].shape == (5, 6, 1, 28, 28)
    assert batch["train"][1].shape == (5, 6)
    assert batch["test"][0].shape == (5, 12, 1, 28, 28)
    assert batch["test"][0].dtype == torch.float32
    assert batch["test"][1].dtype == torch.int64


def test_test_shots_default_to_shots(omniglot_root: Path) -> None:
    assert first(tiny_omniglot(omniglot_root))["test"][1].shape == (1, 6)


def test_arguments_may_be_given_by_position(omniglot_root: Path) -> None:
    dataset = omniglot(
        str(omniglot_root), 2, 3, True, 4, 0, meta_train=True, use_vinyals_split=False
    )
    assert dataset.episodes.spec == tiny_omniglot(omniglot_root, test_shots=4).episodes.spec


def test_a_second_loop_goes_on_where_the_first_one_ended(omniglot_root: Path) -> None:
    through = list(islice(BatchMetaDataLoader(tiny_omniglot(omniglot_root)), 6))
    loader = BatchMetaDataLoader(tiny_omniglot(omniglot_root))
    pieces = []
    for _ in range(3):
        for count, batch in enumerate(loader, start=1):
            pieces.append(batch)
            if count == 2:
                break
    for one, other in zip(through, pieces, strict=True):
        assert torch.equal(one["train"][0], other["train"][0])


def test_a_seed_decides_every_batch(omniglot_root: Path) -> None:
    one, again, other = (
        first(tiny_omniglot(omniglot_root, seed=seed))["train"][0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_without_a_seed_streams_are_fresh_and_follow_random_seed() -> None:
    random.seed(3)
    one, other = (first(sinusoid(shots=4))["train"][0] for _ in range(2))
    random.seed(3)
    again = first(sinusoid(shots=4))["train"][0]
    assert not torch.equal(one, other)
    assert torch.equal(one, again)


def test_splits_have_different_classes(omniglot_root: Path) -> None:
    train, test = (
        tiny_omniglot(omniglot_root, meta_train=False, meta_split=split).episodes.source
        for split in ("train", "test")
    )
    assert not set(train.classes) & set(test.classes)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "flags", [{"meta_train": True}, {"meta_split": "train"}, {"meta_test": True}]
)
def test_a_split_can_be_asked_for_in_each_way(omniglot_root: Path, flags: dict[str, Any]) -> None:
    split = tiny_omniglot(omniglot_root, **({"meta_train": False} | flags)).episodes.spec.split
    assert split == ("test" if "meta_test" in flags else "train")


@pytest.mark.parametrize(
    "flags",
    [
        {"meta_train": False},
        {"meta_test": True},
        {"meta_split": "test"},
        {"meta_train": False, "meta_split": "all"},
        {"meta_train": False, "meta_val": True},
    ],
)
def test_no_split_or_more_than_one_or_one_that_is_not_is_refused(
    omniglot_root: Path, flags: dict[str, Any]
) -> None:
    with pytest.raises(DatasetError, match=r"exactly one of|has no '(all|val)' split"):
        tiny_omniglot(omniglot_root, **flags)


@pytest.mark.parametrize(
    "option",
    [
        {"shuffle": False},
        {"transform": torch.nn.Identity()},
        {"dataset_transform": torch.nn.Identity()},
        {"target_transform": Categorical(7)},
        {"class_augmentations": [Rotation([45])]},
        {"transform": Compose([Resize(84), ToTensor()])},
    ],
)
def test_what_cannot_be_honoured_is_refused(omniglot_root: Path, option: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match=f"{next(iter(option))}=.* is not supported, only"):
        tiny_omniglot(omniglot_root, **option)


def test_torchmetas_defaults_may_be_spelt_out(omniglot_root: Path) -> None:
    spelt = tiny_omniglot(
        omniglot_root,
        shuffle=True,
        target_transform=Categorical(3),
        class_augmentations=[Rotation([90, 180, 270])],
        download=False,
    )
    assert spelt.episodes.spec == tiny_omniglot(omniglot_root).episodes.spec


@pytest.mark.parametrize(
    "option", [{"shuffle": False}, {"sampler": range(3)}, {"worker_init_fn": print}]
)
def test_the_loader_refuses_what_it_cannot_do(option: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match="is not supported"):
        BatchMetaDataLoader(sinusoid(shots=1), **option)


def test_the_loader_has_torchmetas_signature_and_takes_hints() -> None:
    assert list(inspect.signature(BatchMetaDataLoader).parameters) == [
        "dataset",
        "batch_size",
        "shuffle",
        "sampler",
        "num_workers",
        "pin_memory",
        "drop_last",
        "timeout",
        "worker_init_fn",
    ]
    dataset = sinusoid(shots=1, seed=0)
    batch = first(dataset, num_workers=4, pin_memory=True, drop_last=True, timeout=3)
    assert torch.equal(batch["train"][0], first(dataset)["train"][0])


def test_the_other_names_of_a_splitter_rename_the_halves(omniglot_root: Path) -> None:
    dataset = ClassSplitter(
        tiny_omniglot(omniglot_root), num_support_per_class=1, num_query_per_class=5
    )
    batch = first(dataset)
    assert list(batch) == ["support", "query"]
    assert batch["support"][1].shape == (1, 3)
    assert batch["query"][1].shape == (1, 15)


def test_a_splitter_takes_its_names_from_a_mapping(omniglot_root: Path) -> None:
    samples = {"few": 1, "rest": 2}
    dataset = ClassSplitter(tiny_omniglot(omniglot_root), num_samples_per_class=samples)
    assert list(first(dataset)) == ["few", "rest"]


def test_datasets_are_built_as_in_pytorch_maml(omniglot_root: Path) -> None:
    splitter = ClassSplitter(shuffle=True, num_train_per_class=1, num_test_per_class=5)
    train = Omniglot(
        str(omniglot_root),
        transform=Compose([Resize(28), ToTensor()]),
        target_transform=Categorical(3),
        num_classes_per_task=3,
        meta_train=True,
        use_vinyals_split=False,
        class_augmentations=[Rotation([90, 180, -90])],
        dataset_transform=splitter,
        download=False,
        seed=0,
    )
    helped = tiny_omniglot(omniglot_root, shots=1, test_shots=5)
    for half in ("train", "test"):
        assert torch.equal(first(train)[half][0], first(helped)[half][0])
    assert train.num_classes_per_task == 3


def test_a_dataset_is_split_afterwards_as_in_torchmetas_readme(omniglot_root: Path) -> None:
    dataset = Omniglot(
        str(omniglot_root),
        num_classes_per_task=3,
        target_transform=Categorical(num_classes=3),
        meta_train=True,
        use_vinyals_split=False,
    )
    with pytest.raises(DatasetError, match="wrap the dataset in ClassSplitter"):
        BatchMetaDataLoader(dataset)
    dataset = ClassSplitter(dataset, shuffle=True, num_train_per_class=2, num_test_per_class=3)
    assert first(dataset, batch_size=4)["test"][0].shape == (4, 9, 1, 28, 28)


def test_without_augmentation_no_class_is_a_rotation(omniglot_root: Path) -> None:
    turned = tiny_omniglot(omniglot_root).source
    plain = tiny_omniglot(omniglot_root, class_augmentations=None).source
    assert plain.class_count() * 4 == turned.class_count()  # type: ignore[operator]
    assert all(name.endswith("/rot000") for name in plain.classes)  # type: ignore[attr-defined]


def test_sinusoids_are_built_as_in_pytorch_maml() -> None:
    def built(points: int) -> MetaDataset:
        return Sinusoid(
            points,
            num_tasks=1000000,
            transform=ToTensor1D(),
            target_transform=ToTensor1D(),
            dataset_transform=ClassSplitter(num_train_per_class=10, num_test_per_class=15),
            seed=0,
        )

    helped = first(sinusoid(shots=10, test_shots=15, seed=0))
    assert torch.equal(first(built(25))["test"][1], helped["test"][1])
    with pytest.raises(DatasetError, match="24 points, not the 25"):
        built(24)


def test_another_seed_may_be_chosen_later(omniglot_root: Path) -> None:
    dataset = tiny_omniglot(omniglot_root)
    loader = BatchMetaDataLoader(dataset)
    dataset.seed(1)
    chosen = first(tiny_omniglot(omniglot_root, seed=1))["train"][0]
    assert torch.equal(next(iter(loader))["train"][0], chosen)


def test_a_loop_ends_after_as_many_tasks_as_there_are_and_the_next_one_goes_on(
    omniglot_root: Path,
) -> None:
    dataset = tiny_omniglot(omniglot_root, ways=2, class_augmentations=None)
    tasks = len(dataset)
    classes = dataset.source.class_count()
    assert classes is not None
    assert tasks == classes * (classes - 1) // 2
    loader = BatchMetaDataLoader(dataset, batch_size=2)
    assert len(loader) == -(-tasks // 2)
    assert len(BatchMetaDataLoader(dataset, batch_size=2, drop_last=True)) == tasks // 2
    passes = [[batch["train"][0] for batch in loader] for _ in range(2)]
    assert [len(each) for each in passes] == [len(loader)] * 2
    straight = dataset.episodes
    again = torch.cat([straight[index]["train"][0] for index in range(4 * len(loader))])
    assert torch.equal(torch.cat([*passes[0], *passes[1]]), again)
    assert len(BatchMetaDataLoader(sinusoid(shots=1), batch_size=16)) == 62500


def test_an_interruption_loses_no_batch_and_ends_no_loader(
    omniglot_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = BatchMetaDataLoader(tiny_omniglot(omniglot_root))
    undisturbed = [batch["train"][0] for batch in islice(loader, 3)]
    loader = BatchMetaDataLoader(tiny_omniglot(omniglot_root))
    assert torch.equal(next(iter(loader))["train"][0], undisturbed[0])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("datasets.episodes.ClassSource.batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(iter(loader))
    rest = [batch["train"][0] for batch in islice(copy.deepcopy(loader), 2)]
    assert torch.equal(torch.cat(rest), torch.cat(undisturbed[1:]))


@pytest.mark.parametrize("dataset", [MiniImagenet, CIFARFS, FC100])
def test_datasets_look_for_their_data_in_the_folder(dataset: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        dataset(str(tmp_path), num_classes_per_task=5, meta_train=True)
    assert str(tmp_path) in str(caught.value)


def test_a_splitter_refuses_what_it_cannot_do(omniglot_root: Path) -> None:
    dataset = tiny_omniglot(omniglot_root)
    with pytest.raises(DatasetError, match="two sets of samples"):
        ClassSplitter(dataset, num_train_per_class=1)
    with pytest.raises(DatasetError, match="a class with 6"):
        ClassSplitter(dataset, num_train_per_class=3, num_test_per_class=4)
    with pytest.raises(DatasetError, match="random_state_seed"):
        ClassSplitter(dataset, num_train_per_class=1, num_test_per_class=1, random_state_seed=1)


@pytest.mark.parametrize("helper", [omniglot, miniimagenet, cifar_fs, fc100])
def test_missing_data_is_looked_for_in_the_folder(helper: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        helper(str(tmp_path), shots=1, ways=5, meta_train=True)
    assert str(tmp_path) in str(caught.value)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads only slow down models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapted(model: torch.nn.Module, loss: Tensor, step_size: float) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    return {
        name: parameter - step_size * gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


def maml(
    dataset: Any, model: torch.nn.Module, step_size: float, max_batches: int, batch_size: int
) -> list[float]:
    """MAML as a user of torchmeta writes it; the loss of each batch."""
    dataloader = BatchMetaDataLoader(
        dataset, batch_size=batch_size, shuffle=True, num_workers=2, pin_memory=True
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    num_batches = 0
    while num_batches < max_batches:
        for batch in dataloader:
            if num_batches >= max_batches:
                break
            num_tasks = batch["test"][1].size(0)
            is_classification = not batch["train"][1].dtype.is_floating_point
            loss_function = F.cross_entropy if is_classification else F.mse_loss
            outer_loss = torch.tensor(0.0)
            for train_inputs, train_targets, test_inputs, test_targets in zip(
                *batch["train"], *batch["test"], strict=True
            ):
                inner_loss = loss_function(model(train_inputs), train_targets)
                params = adapted(model, inner_loss, step_size)
                test_logits = torch.func.functional_call(model, params, (test_inputs,))
                outer_loss += loss_function(test_logits, test_targets) / num_tasks
            optimizer.zero_grad()
            outer_loss.backward()
            optimizer.step()
            losses.append(outer_loss.item())
            num_batches += 1
    return losses


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


@pytest.mark.usefixtures("one_thread")
def test_a_maml_script_of_torchmetas_learns_sinusoids() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 40), torch.nn.ReLU(),
        torch.nn.Linear(40, 1),
    )  # fmt: skip
    losses = maml(sinusoid(shots=10, test_shots=15, seed=0), model, 0.01, 100, batch_size=8)
    assert len(losses) == 100
    assert mean(losses[-20:]) < 0.8 * mean(losses[:20])


@pytest.mark.usefixtures("one_thread")
def test_a_maml_script_of_torchmetas_learns_characters(omniglot_root: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(784, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    )
    losses = maml(tiny_omniglot(omniglot_root), model, 0.4, 40, batch_size=4)
    assert mean(losses[-10:]) < 0.6 * mean(losses[:5])
