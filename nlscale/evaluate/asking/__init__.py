"""How trained models are asked: parts of work that ranks share, results that are kept, progress."""
