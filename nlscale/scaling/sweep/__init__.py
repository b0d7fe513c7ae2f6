"""Sweeps: many runs from one file, listed and priced first, each run once. No torch is imported.

    recipe: recipes/quickstart.yaml           # what all runs have in common
    dir: runs/sweeps/example                  # each run gets a folder of its own in it
    set: {optimizer.schedule: wsd}            # keys set otherwise than the recipe
    axes:                                     # the runs are all combinations
      model.mixer: [hope, attention]          # values of a key
      size:                                   # names, each for several keys
        small: {model.d_model: 48, model.heads: 3}
        large: {model.d_model: 96, model.heads: 6}
      tokens: {per_parameter: [5, 10, 20]}    # or token budgets: [1M, 2M]
    workers: 2                                # runs at a time on this machine
    ranks: 2                                  # processes of each run, with parallel.ranks_per_node
    build_data: nlscale data build ...        # what builds the data, or a list of that
    search: {key: ..., values: ..., seed: 1}  # see `nlscale.scaling.sweep.search`
    compare: {by: model.mixer}                # as `nlscale compare`, at the end

The axis `size` may be a ladder instead (see `nlscale.scaling.sweep.ladder`):

      size: {parameters: [100M, 340M], width_per_layer: 64, head_dim: 64}
"""
