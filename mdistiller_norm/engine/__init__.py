"""Training and evaluation: everything between the builders and the run folder."""
