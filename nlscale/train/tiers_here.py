"""Whether this machine has what levels of `memory: nvme` and `update: cpu` take; before a run."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from nlscale.cluster.doctor.disk import file_system
from nlscale.cluster.life.place import place
from nlscale.cluster.machines import Cluster
from nlscale.config.units import human_bytes
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.levels.ring_pieces import operations
from nlscale.levels.spectrum import levels_of
from nlscale.ops import compiled
from nlscale.plan.checkpoint import checkpoint_plan
from nlscale.plan.nvme import nvme_plan

NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs",
    "fuse.juicefs", "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4",
    "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "virtiofs", "wekafs",
}  # fmt: skip
"""File systems whose drives are elsewhere, as the kernel names them."""


def check_tiers_here(config: Config, vocabulary: int, data_parallel: int) -> None:
    """Refuse what would fail, or crawl, once the run is under way.

    Args:
        config: of the run.
        vocabulary: token ids of the model.
        data_parallel: ranks that share a batch.

    Raises:
        UserError: an operation is not compiled; or the folder is not there, is on a network file
            system, has no direct I/O, or has no room for what this node's ranks put there, and
            for a checkpoint where that goes to the same drive.
    """
    for operation in operations(config):
        compiled.check(operation)
    here = place()
    nodes = max(1, here.world // here.local_world)
    cluster = Cluster("here", nodes, here.local_world, 1.0, 1.0)
    plan = nvme_plan(config, levels_of(config), vocabulary, cluster, data_parallel)
    if plan is not None:
        assert config.tiers.folder is not None
        folder, run = Path(config.tiers.folder), Path(config.run.dir)
        saved = 0.0
        if _saves(config) and folder.is_dir() and _same_drive(folder, run):
            parallel = config.parallel
            group_nodes = cluster.nodes_of_a_data_group(parallel.tensor, parallel.pipeline)
            given = config, levels_of(config), vocabulary, cluster, group_nodes
            saved = checkpoint_plan(*given).bytes
        check_folder(folder, plan.gpu_bytes * here.local_world, saved)


def _saves(config: Config) -> bool:
    return config.checkpoint.every is not None or bool(config.checkpoint.steps)


def _same_drive(folder: Path, other: Path) -> bool:
    """Whether the other, or where it is to be made, is on the file system of the folder."""
    there = next(path for path in (other, *other.absolute().parents) if os.path.exists(path))
    return there.stat().st_dev == folder.stat().st_dev


def check_folder(folder: Path, needed: float, saved: float = 0.0) -> None:
    """Refuse a folder for slots; see `check_tiers_here`.

    Args:
        folder: of the node.
        needed: bytes.
        saved: bytes of a checkpoint, which is written to the same drive.
    """
    what = f"tiers.folder {folder}"
    if not folder.is_dir():
        raise UserError(f"{what} is no folder on {os.uname().nodename}; make it on every node")
    kind = file_system(folder)
    if kind in NETWORK:
        raise UserError(
            f"{what} is on a network file system ({kind}); give a folder on a drive of the node"
        )
    name = folder / f".nlscale-tier-{secrets.token_hex(8)}"
    try:
        os.close(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UserError(
                f"{what} ({kind}) has no direct I/O; give a folder on ext4 or xfs"
            ) from error
        raise UserError(
            f"{what} cannot be written: {error.strerror}; give a folder that this user may write to"
        ) from error
    finally:
        name.unlink(missing_ok=True)
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < needed + saved:
        beside = f", and run.dir a checkpoint of {human_bytes(saved)}" if saved else ""
        raise UserError(
            f"{what} has {human_bytes(free)} free, and the ranks of a node put "
            f"{human_bytes(needed)} there{beside}; free some, or use a larger drive"
        )
