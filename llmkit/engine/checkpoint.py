"""Checkpoints that survive a kill, a power cut and a full disk.

Layout: ``step_N/{model/, optimizer.safetensors, state.json, manifest.json}``. A checkpoint is written into a hidden
folder beside its place, synced, and published by one rename. There is no pointer file: the newest folder whose manifest
verifies is the checkpoint. What is there is never trusted by its name alone, and never given up in silence.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.engine import files
from llmkit.engine.manifest import (
    MANIFEST,
    Manifest,
    NewerFormatError,
    library_versions,
    records_of,
    verify,
)
from llmkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MODEL, OPTIMIZER, STATE = "model", "optimizer.safetensors", "state.json"
STEP_FOLDER = re.compile(r"step_(0|[1-9]\d*)")
LEFTOVERS = (".tmp-", ".old-")  # an unfinished save; a checkpoint on its way out

log = logging.getLogger("llmkit.checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. ``state`` is the content of ``state.json``."""

    folder: Path
    step: int
    state: dict[str, Any]
    manifest: Manifest

    @property
    def model(self) -> Path:
        """The Hugging Face folder inside."""
        return self.folder / MODEL

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors, on the CPU."""
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(self.folder / OPTIMIZER)
        return tensors


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify one checkpoint folder and read its state. Errors: ``CheckpointError`` with the reason."""
    return _with_state(folder, verify(folder))


def _with_state(folder: Path, manifest: Manifest) -> Checkpoint:
    return Checkpoint(folder, manifest.step, json.loads((folder / STATE).read_bytes()), manifest)


class CheckpointStore:
    """The ``checkpoints`` folder of one run. Only the process that holds the run's lock may save or clean.

    ``keep_last`` valid checkpoints stay, and the best one as well with ``keep_best``. ``facts`` go into every manifest.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, keep_best: bool, facts: Mapping[str, Any] | None = None
    ) -> None:
        if keep_last < 2:
            raise ValueError(f"keep_last={keep_last}: the newest checkpoint may be damaged, so one is not enough")
        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self.facts = dict(facts or {})
        self._own: dict[int, Manifest] = {}  # written, or verified, by this object

    def steps(self) -> list[int]:
        """Steps that have a folder, valid or not, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for entry in self.folder.iterdir() if (m := STEP_FOLDER.fullmatch(entry.name)))

    def newest(self) -> Checkpoint | None:
        """The newest valid checkpoint; None in a folder that never had one.

        Damaged ones are skipped with a warning. Errors: ``CheckpointError`` when all are damaged, or one is of a newer
        format: a run never starts anew over work it cannot read.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                checkpoint = open_checkpoint(self._place(step))
            except NewerFormatError:
                raise
            except CheckpointError as error:
                log.warning("checkpoint %s is damaged and skipped: %s", self._place(step), error.what)
                reasons.append(f"step_{step}: {error.what}")
            else:
                self._own[step] = checkpoint.manifest
                return checkpoint
        if not reasons:
            return None
        raise CheckpointError(
            "no checkpoint is valid\n" + "\n".join(f"    {reason}" for reason in reasons),
            where=str(self.folder),
            fix="restore one of them from a copy, or start a new run under another run.name",
        )

    def best(self) -> Checkpoint | None:
        """The newest valid checkpoint that was the best when it was written, so that it still is; None without any."""
        for step in reversed(self.steps()):
            manifest = self._valid(step)
            if manifest is not None and manifest.best:
                return _with_state(self._place(step), manifest)
        return None

    def save(
        self,
        step: int,
        *,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        write_model: Callable[[Path], object],
        best: bool,
    ) -> Path:
        """Publish the checkpoint of ``step`` and drop the ones no longer kept. A step already saved is left as it is.

        ``write_model`` fills the folder it is given; ``best`` says that the validation loss is the lowest so far.
        Errors: ``CheckpointError`` when the disk refuses; earlier checkpoints are then as they were.
        """
        target = self._place(step)
        if step in self._own and target.is_dir():
            return target
        self._refuse_foreign(step)
        temporary = self.folder / f".tmp-{target.name}-{os.getpid()}"
        try:
            self.clean()
            manifest = self._write(temporary, step, state, tensors, write_model, best)
            self._publish(temporary, target)
        except BaseException as error:
            self._discard(temporary)
            if files.errno_of(error) is None:
                raise
            raise self._refused(target, error, sum(tensor.nbytes for tensor in tensors.values())) from error
        self._own[step] = manifest
        self._retain()
        return target

    def clean(self) -> None:
        """Remove what a killed process left behind, or a deletion has put out of sight."""
        for entry in self.folder.iterdir() if self.folder.is_dir() else ():
            if entry.name.startswith(LEFTOVERS):
                log.debug("removing %s", entry)
                files.remove_tree(entry)

    def check_space(self, needed_bytes: int) -> None:
        """``CheckpointError`` unless ``needed_bytes`` are free where checkpoints go. For the start of a run."""
        free = self._free_bytes()
        if free < needed_bytes:
            raise CheckpointError(
                f"checkpoints need {files.size_text(needed_bytes)}, but only {files.size_text(free)} are free",
                where=str(self.folder),
                fix="free some space, lower engine.keep_last, or put run.root on a larger disk",
            )

    def _place(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _valid(self, step: int) -> Manifest | None:
        """The manifest of a checkpoint that is known to be good, or is found to be."""
        try:
            return self._own.get(step) or verify(self._place(step))
        except CheckpointError:
            return None

    def _refuse_foreign(self, step: int) -> None:
        """Checkpoints that this run neither wrote nor started from must not be mixed up with its own."""
        foreign = [s for s in self.steps() if s >= step and s not in self._own and self._valid(s)]
        if foreign:
            raise CheckpointError(
                f"step {step} was not saved: step_{foreign[-1]} of another run is already there",
                where=str(self.folder),
                fix="use another run.name, or move the old checkpoints away",
            )

    def _write(
        self,
        folder: Path,
        step: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        write_model: Callable[[Path], object],
        best: bool,
    ) -> Manifest:
        """Everything, synced, the manifest last."""
        from safetensors.torch import save_file

        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        files.make_folder(folder / MODEL)
        files.write(folder / STATE, (json.dumps(state, indent=1) + "\n").encode())
        files.write_with(folder / OPTIMIZER, lambda path: save_file(contiguous, path))
        files.write_with(folder / MODEL, write_model)
        mode = stat.S_IMODE((folder / STATE).stat().st_mode)  # follows the umask; safetensors' writer does not
        written = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        for path in written.values():
            path.chmod(mode)
            files.sync(path)
        manifest = Manifest(step, best, self.facts, library_versions(), records_of(written))
        files.write(folder / MANIFEST, manifest.render())
        for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
            files.sync(path)
        return manifest

    def _publish(self, temporary: Path, target: Path) -> None:
        """The rename is the commit. A damaged checkpoint of the same step makes room first."""
        if target.exists() or target.is_symlink():
            files.rename(target, self._way_out(target))
        files.rename(temporary, target)
        files.sync(self.folder)

    def _retain(self) -> None:
        """Drop what is older than the newest ``keep_last`` valid checkpoints, except the best.

        ``best`` was the lowest loss when it was written, so the newest one marked so is the best of all. A failure here
        is a warning: the new checkpoint is safe, and the next save cleans up.
        """
        n_valid, best_found = 0, not self.keep_best
        try:
            for step in reversed(self.steps()):
                enough = n_valid >= self.keep_last
                manifest = None if enough and best_found else self._valid(step)
                is_best = not best_found and manifest is not None and manifest.best
                best_found = best_found or is_best
                n_valid += manifest is not None
                if enough and not is_best:
                    self._drop(step)
            self.clean()
        except OSError as error:
            log.warning("an old checkpoint in %s could not be removed: %s", self.folder, error.strerror)

    def _drop(self, step: int) -> None:
        """Out of sight by one rename, so that a kill during the deletion leaves no half checkpoint."""
        files.rename(self._place(step), self._way_out(self._place(step)))
        self._own.pop(step, None)

    def _way_out(self, place: Path) -> Path:
        return place.with_name(f".old-{place.name}-{os.getpid()}")

    def _discard(self, temporary: Path) -> None:
        """Remove a save that failed; the error that failed it is the one to report."""
        try:
            files.remove_tree(temporary)
        except OSError as error:
            log.warning("%s could not be removed: %s", temporary, error.strerror)

    def _refused(self, target: Path, error: BaseException, tensor_bytes: int) -> CheckpointError:
        needed = max([tensor_bytes, *(manifest.n_bytes for manifest in self._own.values())])
        reason = os.strerror(files.errno_of(error) or 0)
        return CheckpointError(
            f"{target.name} was not saved: {reason} (it needs about {files.size_text(needed)}, "
            f"{files.size_text(self._free_bytes())} are free)",
            where=str(target),
            fix="earlier checkpoints are intact: make room or mend the disk, then run the same command again",
        )

    def _free_bytes(self) -> int:
        existing = next(place for place in (self.folder, *self.folder.absolute().parents) if place.is_dir())
        return shutil.disk_usage(existing).free
