"""The tier on the accelerator: entries that need no transfer to go on."""

from __future__ import annotations

from jkv.errors import TierError
from jkv.store.entry import Entry
from jkv.store.memory import Memory, copied_meta


class Device(Memory):
    """Entries in the memory of JAX's default device.

    What is read has arrays of JAX; a tier below gets them as numpy's. Arrays that JAX would round
    stay as they are, on the host: those of 64 bits, unless `jax_enable_x64` is set.

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

        wide = {
            name: array
            for name, array in entry.arrays.items()
            if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
        }
        stay = super()._kept(Entry(wide, {})).arrays
        try:
            arrays = {
                name: stay[name] if name in stay else jax.numpy.array(array)
                for name, array in entry.arrays.items()
            }
            return Entry(jax.block_until_ready(arrays), copied_meta(entry))
        except jax.errors.JaxRuntimeError as error:
            raise TierError(f"the device does not take {entry.nbytes} bytes: {error}") from error
