"""The tier on the accelerator: entries that need no transfer to go on."""

from __future__ import annotations

from jkv.errors import TierError
from jkv.store.entry import Entry
from jkv.store.memory import Memory


class Device(Memory):
    """Entries in the memory of JAX's default device.

    What is read has arrays of JAX; a tier below gets them as numpy's.

    Args:
        max_bytes, max_entries: limits that a store is to keep; nothing is refused here.
    """

    name = "device"

    def _kept(self, entry: Entry) -> Entry:
        """Copies on the device, waited for: nobody else's buffer is kept, and failures show here.

        Raises:
            TierError: the device has no room.
        """
        import jax

        try:
            arrays = {name: jax.numpy.array(array) for name, array in entry.arrays.items()}
            return Entry(jax.block_until_ready(arrays), entry.meta)
        except jax.errors.JaxRuntimeError as error:
            raise TierError(f"the device does not take {entry.nbytes} bytes: {error}") from error
