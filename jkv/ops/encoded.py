"""The former name of `jkv.ops.codecs`."""

raise ImportError("jkv.ops.encoded is jkv.ops.codecs now")
