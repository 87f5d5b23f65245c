"""A store under random sequences of commands, kills and damage, compared with a plain dictionary.

The dictionary has the values that each pass must have, computed once by uninterrupted commands. Whatever happened
before, a read returns these values or one error that names a damaged file, and `verify` finds all damage.

`make test` runs a few short sequences, `make test-all` 100 of 30 steps.
"""

import contextlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from safetensors.torch import save_file

from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import UserError
from permafrost.models.providers import build_model
from permafrost.storage import local_files
from permafrost.storage.lock import LockedError, folder_lock
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.reader import Store
from permafrost.store.tars import ShardBytes
from permafrost.store.verification import verify_store
from tests.support.crashes import Stopped, StoppingOs
from tests.support.stores import TINY_DATA, precompute_config
from tests.support.trees import all_files, tree_bytes
from tests.support.verbs import precompute

DATA = replace(TINY_DATA, train_digits=10, test_digits=3, teacher_digits=3)
TEACHERS = ("one", "two", "three")
MOST_OPERATIONS = 400
"""Upper bound on the number of file operations before a kill, above that of one command."""


class Sound:
    """Dictionary of what a store must contain: values of every record by pass, and bytes of every file."""

    def __init__(self, folder: Path) -> None:
        self.weights = {}
        for seed, name in enumerate(TEACHERS):
            torch.manual_seed(seed)
            network = build_model(CifarModelConfig(name="resnet8", width=4), 10)
            self.weights[name] = folder / f"{name}.safetensors"
            save_file(network.state_dict(), self.weights[name])
        self.store = folder / "store"
        for name in TEACHERS:
            precompute.run(self.config(self.store, name))
        self.values = read_values(self.store)
        self.images = read_images(self.store)
        self.bytes = tree_bytes(self.store)

    def config(self, store: Path, teacher: str):
        """Options of `precompute` with one of the teachers."""
        network = CifarModelConfig(name="resnet8", width=4, weights=str(self.weights[teacher]))
        annotate = PassOptions(batch_size=64, outputs=("logits", "maps"), name=teacher)
        return precompute_config(store, network, data=DATA, shard_size=8, annotate=annotate)


def read_values(path: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """Values of every published pass: pass -> key -> field -> bytes."""
    store = Store(path)
    values = {}
    for folder in store.pass_folders():
        teacher_pass = store.open_pass(folder.name)
        of_keys = values.setdefault(folder.name.partition("-")[0], {})
        for shard in store.shards:
            stored = teacher_pass.read_shard(shard)
            for row, key in enumerate(teacher_pass.shard_keys(shard)):
                of_keys[key] = {name: array[row].tobytes() for name, array in stored.items()}
    return values


def read_images(path: Path) -> dict[str, bytes]:
    """Bytes of every stored image by key."""
    store = Store(path)
    images = {}
    for number, shard in enumerate(store.shards):
        rows = store.rows_of_shard(number)
        named = ("offset", "size", "image_crc32c")
        columns = store.index.take(named, rows)
        file = ShardBytes(store.path, shard)
        for key, *place in zip(store.index.keys(rows), *columns.values(), strict=True):
            offset, size, crc32c = (int(each) for each in place)
            images[key] = file.read(offset, size, crc32c, key)
    return images


class StoreMachine(RuleBasedStateMachine):
    """Store, and the plain facts about it that the steps so far imply."""

    sound: Sound

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=self.sound.store.parent))
        self.store = self.folder / "store"
        self.whole: set[str] = set()
        """Teachers whose pass was finished by a command that succeeded."""
        self.begun: set[str] = set()
        """Teachers of any command so far."""
        self.damaged: dict[Path, bytes] = {}
        """Damaged files and their sound bytes."""

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    # ---- steps -----------------------------------------------------------------------------------

    @rule(teacher=st.sampled_from(TEACHERS))
    def precompute(self, teacher: str) -> None:
        """Begin a store, resume one, add a pass to it, or find nothing to do."""
        self.begun.add(teacher)
        try:
            precompute.run(self.sound.config(self.store, teacher))
        except UserError as error:
            self._require_damage_of(error)
        else:
            self.whole.add(teacher)

    @rule(teacher=st.sampled_from(TEACHERS), operations=st.integers(0, MOST_OPERATIONS))
    def kill(self, teacher: str, operations: int) -> None:
        """End `precompute` after a number of file operations, as a power cut would."""
        self.begun.add(teacher)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_files, "os", StoppingOs(operations))
            try:
                precompute.run(self.sound.config(self.store, teacher))
            except Stopped:
                return
            except UserError as error:
                self._require_damage_of(error)
                return
        self.whole.add(teacher)

    @precondition(lambda self: self.whole and len(self.damaged) < 2)
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        """Flip one bit of any file of the finished store."""
        every = [p for p in all_files(self.store) if p not in self.damaged and self._is_final(p)]
        path = data.draw(st.sampled_from(every))
        raw = bytearray(path.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        self.damaged[path] = bytes(raw)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)

    @precondition(lambda self: self.damaged)
    @rule()
    def repair(self) -> None:
        """Follow the advice for damaged files: delete them, and the manifest if it lists them by digest; run again."""
        for path in self.damaged:
            path.unlink(missing_ok=True)
            folder = path.parent
            if path.suffix in (".arrow", ".parquet") and (folder / "manifest.json").exists():
                (folder / "manifest.json").unlink()
        self.damaged.clear()
        for teacher in sorted(self.begun):
            self.precompute(teacher)
        assert self.whole == self.begun

    @precondition(lambda self: self.whole)
    @rule(teacher=st.sampled_from(TEACHERS))
    def write_beside_another_writer(self, teacher: str) -> None:
        """Refuse a second writer, and leave every byte as it is."""
        before = tree_bytes(self.store)
        with folder_lock(self.store), contextlib.suppress(LockedError):
            precompute.run(self.sound.config(self.store, teacher))
            assert teacher in self.whole, "the second writer was not refused"
        assert tree_bytes(self.store) == before

    # ---- what always holds -----------------------------------------------------------------------

    @invariant()
    def reads_are_sound(self) -> None:
        """Compare every value that can be read with the dictionary."""
        if not hasattr(self, "store"):
            return
        try:
            images, values = read_images(self.store), read_values(self.store)
        except UserError as error:
            if self.whole:
                self._require_damage_of(error)
            return
        assert images == self.sound.images
        for name, of_keys in values.items():
            assert of_keys == self.sound.values[name], name
        assert self.damaged or self.whole <= values.keys() <= self.begun

    @invariant()
    def verify_finds_the_damage(self) -> None:
        """Name every damaged file, and nothing else but passes that are not finished."""
        if not hasattr(self, "store") or not self.whole:
            return
        problems = list(verify_store(self.store))
        for path in self.damaged:
            # A damaged manifest or table of shards hides what it lists.
            lists = (MANIFEST_NAME, "shards-*.parquet")
            above = {
                each
                for each in self.damaged
                if each.parent in path.parents and any(map(each.match, lists))
            }
            named = [p for p in problems if any(str(each) in p for each in (path, *above))]
            assert named, f"{path}: {problems}"
        unfinished = [
            f"{self.store / 'teachers' / teacher}-" for teacher in self.begun - self.whole
        ]
        for problem in problems:
            is_expected = any(folder in problem for folder in unfinished)
            assert is_expected or self._names_damage(problem), problem

    def _require_damage_of(self, error: UserError) -> None:
        assert self._names_damage(error), error

    def _names_damage(self, error: object) -> bool:
        return any(str(path) in str(error) for path in self.damaged)

    def _is_final(self, path: Path) -> bool:
        """Return whether a file belongs to the store, not to an interrupted command."""
        name = path.relative_to(self.store).as_posix()
        finished = {t for t in self.whole if name.startswith(f"teachers/{t}-")}
        return name in self.sound.bytes and (not name.startswith("teachers/") or bool(finished))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return Sound(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize(("runs", "steps"), [(2, 8), pytest.param(100, 30, marks=pytest.mark.slow)])
@pytest.mark.timeout(3000)
def test_a_store_keeps_its_values_through_anything(runs, steps, sound, count_trials):
    machine = type("Machine", (StoreMachine,), {"sound": sound})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    count_trials(f"a store through up to {steps} steps", {"the same values": runs})


def test_the_comparison_finds_a_wrong_value(sound, tmp_path):
    """Control: a value that differs from the dictionary, in a store that is signed correctly, is found."""
    machine = type("Machine", (StoreMachine,), {"sound": sound})()
    machine.begin()
    machine.precompute("one")
    machine.reads_are_sound()
    key = next(iter(sound.values["one"]))
    logits = np.frombuffer(sound.values["one"][key]["logits"], np.float32).copy()
    logits[0] += 1
    right = sound.values["one"][key]["logits"]
    sound.values["one"][key]["logits"] = logits.tobytes()
    try:
        with pytest.raises(AssertionError):
            machine.reads_are_sound()
    finally:
        sound.values["one"][key]["logits"] = right
        machine.teardown()
