"""Training runs compared: `config` (arms, seeds) -> `runner`, `watch` -> `records` (files) -> `report`, `plots`."""
