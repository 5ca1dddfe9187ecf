"""Training a compressor: `config` -> `corpora` (tokens on disk) -> `examples` -> `batch` -> `objective` -> `loop`."""
