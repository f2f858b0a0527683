"""KV blocks in the memory of a GPU: the mover's view of them, their checksums, their codecs.

The only part of the hand-off that needs torch and CUDA; it is imported where a cache lies on a GPU, and nowhere else.
"""
