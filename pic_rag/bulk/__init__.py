"""Whole corpora become memories: what is to be done (`corpus`), the doing of it (`worker`), and where (`engines`)."""
