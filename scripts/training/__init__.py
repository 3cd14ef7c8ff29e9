"""The parts of `scripts/train.py`: the text as tokens, a run's state, the finished directory."""
