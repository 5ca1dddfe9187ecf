"""Retrieval: documents come in here, and questions find their passages.

`documents` reads files, `passages` cuts what is in them, `retriever` embeds and searches the passages, `files` brings
it up to date with files, `index_folder` keeps it on disk. This room does not know that passages are
compressed, nor who answers the question.
"""
