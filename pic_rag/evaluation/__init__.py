"""Evaluation: how well each system answers.

`tasks` says what is asked and `retrieval` where its passages come from; `systems` decides what stands in the prompt
(memories, text, text cut by `shortening` or `lingua`), `runner` lets every system answer everything, `metrics` scores
the answers and `report` makes tables of them; `fidelity` tries what a memory's fidelity is good for. This room does
not know how a compressor is trained.
"""
