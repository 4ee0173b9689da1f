"""The measurements behind bench.py, and capacity.py, which predicts what some of them find."""
