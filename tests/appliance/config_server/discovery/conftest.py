from tests.vsphere_emu.fixtures import make_vcenter  # noqa: F401
