"""Bulk: whole corpora become memories in a store, ahead of any question.

`corpus` is what is to be done, `worker` the doing of it, `engines` (and `on_ray`) where it is done, `run` counts. This
room does not know how a text is compressed or a memory written, and nothing of questions.
"""
