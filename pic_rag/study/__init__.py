"""Study: training configurations compared, every arm with every seed.

`config` (arms, seeds) -> `runner`, `watch` -> `records` (files) -> `report`, `plots`. What is measured is kept in small
files, so the second half needs no model. This room does not know how a step is trained or an answer scored.
"""
