"""Retrieval: documents come in here, and questions find their passages.

`documents` reads files, `passages` cuts what is in them, `retriever` embeds and searches the passages, `index_folder`
keeps a retriever on disk. This room does not know that passages are compressed, nor who answers the question.
"""
