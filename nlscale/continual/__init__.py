"""Learning tasks one after the other, and what is left of the first: streams. No torch is imported.

    recipe: recipes/quickstart.yaml       # what all runs have in common
    dir: runs/streams/example             # each run gets a folder of its own in it
    set: {optimizer.schedule: constant}   # keys set otherwise than the recipe
    tasks:                                # in their order
      en: {data: data/manuals-en, steps: 200}        # or tokens: 1M
      de: {data: [{dir: data/manuals-de, weight: 3}, {dir: data/news-de, weight: 1}], steps: 200}
    methods:                              # of nlscale.continual.methods.table; several in one go
      naive:
      joint:
      ewc: {ewc: {strength: 10}}
      slow: {set: {levels: [1, 16, 200]}}            # keys set for this one alone
    seeds: [1, 2, 3]
    boundaries: known                     # or unknown: nobody says when a task ends
    optimizer: kept                       # or reset at each boundary
    metric: bits_per_byte                 # or loss, nats a token; or accuracy, of labels
    every: 50                             # steps between scores beside those at boundaries
    workers: 2                            # runs at a time on this machine
    ranks: 1                              # processes of each run
    build_data: nlscale data build ...    # what builds the data, or a list of that

A stream under a method is one run, whose mixture of data changes from task to task: the windows of
levels, their optimizers and its checkpoints go on over a boundary as over any other step.
"""
