"""The configuration files of the test cluster, and the commands of those daemons that take theirs by option."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Sequence
from pathlib import Path

_SLURM = """
ClusterName=braid{number}
SlurmctldHost={host}(10.77.{number}.1)
SlurmctldPort={controller_port}
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Five seconds is also the shortest time after which a requeued job may start again; it is 120 by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
ReturnToService=2
SlurmdTimeout=15
KillWait=2
MinJobAge=300
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ScronParameters=enable
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
NodeName={nodes} CPUs=4 RealMemory=5000 Gres=gpu:{gpus}
PartitionName=main Nodes={nodes} Default=YES MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes={nodes} MaxTime=1:00:00 PriorityTier=10 PreemptMode=OFF
"""

_ACCOUNTING = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={accounting_port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct
"""

_CGROUP = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
"""


def write(folder: Path, *, number: int, nodes: Sequence[str], gpus: int, ports: Sequence[int]) -> None:
    """Write all files, and the devices that stand for GPUs.

    Args:
        ports: of the database, the accounting and the controller.
    """
    password = secrets.token_hex(16)
    names = f"n[{nodes[0][1:]}-{nodes[-1][1:]}]"
    values = {
        "folder": folder,
        "number": number,
        "host": os.uname().nodename,
        "nodes": names,
        "gpus": gpus,
        "database_port": ports[0],
        "accounting_port": ports[1],
        "controller_port": ports[2],
        "password": password,
    }
    for name in ("state", "spool", "database"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(_SLURM.format(**values))
    (folder / "slurmdbd.conf").write_text(_ACCOUNTING.format(**values))
    (folder / "slurmdbd.conf").chmod(0o600)
    (folder / "cgroup.conf").write_text(_CGROUP)
    devices = [folder / f"gpu{index}" for index in range(gpus)]
    for device in devices:
        # A count without device files leaves nodes invalid.
        os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
    (folder / "gres.conf").write_text(
        f"NodeName={names} Name=gpu File={folder}/gpu[0-{gpus - 1}] Flags=nvidia_gpu_env\n"
    )
    (folder / "database.sql").write_text(
        # One statement a line: the rest of a line is not read.
        f"CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';\nGRANT ALL ON *.* TO 'slurm'@'127.0.0.1';\n"
    )
    (folder / "database.sql").chmod(0o600)


def munged(folder: Path) -> tuple[str, ...]:
    """The command of the authentication daemon."""
    return (
        "munged",
        "--foreground",
        "--force",
        f"--key-file={folder}/munge.key",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid",
        f"--seed-file={folder}/munged.seed",
        f"--log-file={folder}/munged.log",
    )


def mariadbd(folder: Path, port: int) -> tuple[str, ...]:
    """Make a database, and the command that serves it on the loopback."""
    data = folder / "database"
    subprocess.run(
        ("mariadb-install-db", "--no-defaults", "--user=root", "--skip-test-db", f"--datadir={data}"),
        check=True,
        capture_output=True,
    )
    return (
        "mariadbd",
        "--no-defaults",
        "--user=root",
        f"--datadir={data}",
        f"--socket={folder}/mariadb.socket",
        f"--pid-file={folder}/mariadb.pid",
        f"--init-file={folder}/database.sql",
        "--bind-address=127.0.0.1",
        f"--port={port}",
        "--skip-name-resolve",
        "--innodb-buffer-pool-size=64M",
        "--innodb-log-file-size=32M",
        "--innodb-lock-wait-timeout=900",
        "--innodb-flush-log-at-trx-commit=0",
    )
