"""What the launcher said about processes. Free of torch, so that a bad launch is refused at once."""

from __future__ import annotations

from collections.abc import Mapping

from llmkit.errors import DistributedError

# Launchers that start several processes, and the variable in which each says how many.
FOREIGN_WORLD_SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def is_main_process(environment: Mapping[str, str]) -> bool:
    """Rank 0 of the whole job."""
    return environment.get("RANK", "0") == "0"


def refuse_solo_runs(environment: Mapping[str, str]) -> None:
    """A launcher that starts N processes without telling torch would give N independent runs in one folder."""
    if "WORLD_SIZE" in environment:
        return
    for name in FOREIGN_WORLD_SIZES:
        if environment.get(name, "1") not in ("", "1"):
            raise DistributedError(
                f"{name}={environment[name]}, but WORLD_SIZE is not set: every process would train on its own",
                fix="start one `torchrun --nproc-per-node N -m llmkit ...` per node, or run a single task",
            )
