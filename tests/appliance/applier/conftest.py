from tests.azure_emu.fixtures import azurite

__all__ = ["azurite"]
