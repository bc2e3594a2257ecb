"""Tokenised rows on disk: encoded once per machine by all cores, then memory-mapped by every rank.

cache      the cache folder, locks, and hashes of source files
reading    the rows of a source in chunks, in file order
shards     one chunk's token rows as an Arrow file
build      encode the missing shards of an entry
worker     process that encodes chunks
entry      the token rows of one source
order      mixtures, shuffles and held-out splits as index arithmetic
"""
