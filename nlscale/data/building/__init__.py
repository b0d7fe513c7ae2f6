"""Building a data folder, in passes over *units* of the sources.

The files of the sources are cut, in their order, into units of about as many bytes each
(`nlscale.data.building.units`). A unit is the work of one process at a time, and what becomes of it
depends on the sources and the options alone, never on how many processes there are, nor on which
machine does it or how often it was begun. The passes are

    survey       by unit: what is in it, hashes of its documents, text to train a BPE on
    duplicates   by range of hashes, where they are dropped: which documents came before
    (settle)     once: how much was lost, the splits, the tokenizer; then data folders are cleared
    tokens       by unit: shards of its own
    (finish)     once: the shards get their names in the data folders, indexes are written

and what each has made of a unit is a folder below `out`/.units (`nlscale.data.building.work`),
which has its name only once it is whole and on the disk. So the same command, killed anywhere,
goes on from there.

The data folder is `out`; or, for each source, one in it (`nlscale.data.building.by_source`). Units
do not cross data folders, and what is lost and held out is settled for each of them.
"""
