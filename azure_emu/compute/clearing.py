"""Taking away all that a compute node has made, while its daemon does not run.

For a lab that ends, and for a node that is given up: VMs are ended, not shut down.
"""

import asyncio
import os
import uuid
from collections.abc import Sequence

from azure_emu.compute.config import ComputeConfig
from azure_emu.compute.launch import mark_of
from azure_emu.compute.network import Networks
from azure_emu.compute.process import find_processes, kill
from azure_emu.compute.record import find_folders
from daemon.folder_lock import FolderLock
from replication.errors import ConfigError


async def clear(
    config: ComputeConfig, *, vms_folder: str, networks_folder: str
) -> Sequence[uuid.UUID]:
    """End and remove every VM with its disks, then every network; returns the VMs.

    Raises ConfigError while the daemon runs, StorageError for what cannot be removed.
    """
    if not await asyncio.to_thread(os.path.isdir, config.data_folder):
        return ()
    in_use = ConfigError(
        f"the compute node of {config.data_folder} runs", hint="stop it before its VMs are removed"
    )
    with FolderLock(config.data_folder, in_use):
        folders = find_folders(vms_folder)
        for folder in folders:
            for process in find_processes(mark_of(folder.path)):
                await kill(process)
            await asyncio.to_thread(folder.remove)
        await Networks(networks_folder, config.network).remove_unused(set())
    return [folder.vm for folder in folders]
