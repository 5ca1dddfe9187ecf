"""Models: where they are, how they are loaded, and what tells one from another.

`embedded` fetches the default models, `backbone` loads a causal LM and names it by its weights, `checkpoint` is the
folder that a compressor is kept in, `pair` loads the two models that a checkpoint belongs to, `sharing` keeps what is
loaded for the whole process, and `quiet` keeps other libraries silent meanwhile. This room does not know what a model
is used for: no text, memory or prompt gets here.
"""
