"""The paper's tables as data, the runs that fill them, the ledger of what was measured, and the report."""
