"""Tasks that models were trained on: `nlscale eval recall`, `automata`, `mad` and `babi`."""
