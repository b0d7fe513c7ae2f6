"""Looking into a data folder that is built: what it holds, whether it is whole, samples of it."""
