"""Compression: texts in, memories out.

`compressor` cuts texts into segments and makes memories of what the encoder says of them, `batching` encodes the
segments of all threads together, `fidelity` asks the generator how much of a text its memory kept, and `ratios` says
which ratio each text gets: a given one, or the highest that keeps enough. This room does not know the PIC rule, where
memories are kept, or what is asked.
"""
