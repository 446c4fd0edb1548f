"""Reproduction of the paper's tables: table data, run planning and execution, the ledger of runs and the report."""
