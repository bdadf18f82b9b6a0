"""The layered store of recovery points at the second site: docs/STORE.md."""

from appliance.applier.store.catalogue import Chain
from appliance.applier.store.export import export
from appliance.applier.store.layer_writer import LayerWriter
from appliance.applier.store.machine_store import MachineStore
from appliance.applier.store.model import Damage, Head, LayerRow, Point, RottenBlockError
from appliance.applier.store.reader_store import ReaderStore, machines_in, open_reader
from appliance.applier.store.thinning import ThinReport
from appliance.applier.store.view import Run, View

__all__ = [
    "Chain",
    "Damage",
    "Head",
    "LayerRow",
    "LayerWriter",
    "MachineStore",
    "Point",
    "ReaderStore",
    "RottenBlockError",
    "Run",
    "ThinReport",
    "View",
    "export",
    "machines_in",
    "open_reader",
]
