"""Who is how fast, how large and how right, by model: `python bench/run.py --models`."""
